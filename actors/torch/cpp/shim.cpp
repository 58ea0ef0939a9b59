#include "shim.h"
#include "guarded.h"

#include <ATen/CPUGeneratorImpl.h>
#include <c10/core/InferenceMode.h>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/version.h>
#include <utility>
#include <vector>

using at::Tensor;
using torch::autograd::Node;
using torch::autograd::variable_list;

namespace {

std::vector<Tensor> list(const skep_tensor *tensors, size_t n) {
  std::vector<Tensor> out;
  out.reserve(n);
  for (size_t i = 0; i < n; i++) out.push_back(*tensors[i]);
  return out;
}

void give(std::vector<Tensor> &&tensors, skep_tensor *res) {
  for (size_t i = 0; i < tensors.size(); i++)
    res[i] = tensors[i].defined() ? new Tensor(std::move(tensors[i])) : nullptr;
}

struct ForeignNode : public Node {
  std::string label;
  size_t n_in = 0;
  void *ctx = nullptr;
  skep_backward_fn backward = nullptr;
  skep_drop_fn drop = nullptr;

  ~ForeignNode() override { release(); }
  void release() {
    if (void *c = std::exchange(ctx, nullptr)) drop(c);
  }
  // The engine calls this after a backward that does not keep the graph.
  void release_variables() override { release(); }
  std::string name() const override { return label; }

  variable_list apply(variable_list &&grads) override {
    // The engine turns grad mode on for create_graph only.
    if (at::GradMode::is_enabled())
      throw std::runtime_error(label + ": create_graph is not supported: remote gradients cannot be differentiated again");
    if (!ctx) throw std::runtime_error(label + ": backward a second time through a graph that was not kept");
    std::vector<skep_tensor> given(grads.size());
    for (size_t i = 0; i < grads.size(); i++) given[i] = grads[i].defined() ? &grads[i] : nullptr;
    std::vector<uint8_t> needs(n_in);
    for (size_t i = 0; i < n_in; i++) needs[i] = task_should_compute_output(i);
    std::vector<skep_tensor> res(n_in, nullptr);
    char *error = backward(ctx, given.data(), given.size(), needs.data(), res.data(), n_in);
    variable_list out(n_in);
    for (size_t i = 0; i < n_in; i++) {
      if (!res[i]) continue;
      out[i] = std::move(*res[i]);
      delete res[i];
    }
    if (error) {
      std::string text(error);
      free(error);
      throw std::runtime_error(text);
    }
    return out;
  }
};

std::shared_ptr<ForeignNode> make_node() {
#if TORCH_VERSION_MAJOR > 2 || TORCH_VERSION_MINOR >= 12
#error "nodes became intrusive pointers after 2.11: adapt make_node"
#endif
  // deleteNode frees long chains without recursion.
  return std::shared_ptr<ForeignNode>(new ForeignNode(), torch::autograd::deleteNode);
}

} // namespace

char *skep_attach(const char *name, const skep_tensor *ins, size_t n_in, const skep_tensor *outs, size_t n_out,
                  skep_tensor *res, void *ctx, skep_backward_fn backward, skep_drop_fn drop) {
  auto node = make_node();
  node->ctx = ctx;
  node->drop = drop;
  node->backward = backward;
  node->n_in = n_in;
  return guarded([&] {
    node->label = name;
    auto inputs = list(ins, n_in);
    bool any = false;
    for (const auto &input : inputs) any |= input.requires_grad();
    bool record = any && at::GradMode::is_enabled();
    if (record) node->set_next_edges(torch::autograd::collect_next_edges(inputs));
    std::vector<Tensor> outputs;
    for (size_t i = 0; i < n_out; i++) {
      outputs.push_back(outs[i]->detach());
      if (!record) continue;
      if (torch::autograd::isDifferentiableType(outputs[i].scalar_type()))
        torch::autograd::set_history(outputs[i], node);
      else
        node->add_input_metadata(Node::undefined_input());
    }
    give(std::move(outputs), res);
  });
}

char *skep_vjp(const skep_tensor *outs, const skep_tensor *grads, size_t n_out, const skep_tensor *ins, size_t n_in,
               skep_tensor *res) {
  return guarded([&] {
    give(torch::autograd::grad(list(outs, n_out), list(ins, n_in), list(grads, n_out), /*retain_graph=*/false,
                               /*create_graph=*/false, /*allow_unused=*/true),
         res);
  });
}

char *skep_sgd(const skep_tensor *params, const skep_tensor *grads, const skep_tensor *momenta, size_t n, double lr,
               double momentum, double weight_decay, bool nesterov) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    // Momenta start at zero, so the first step needs no special case while dampening is 0.
    at::_fused_sgd_(list(params, n), list(grads, n), momenta ? list(momenta, n) : std::vector<Tensor>(), weight_decay,
                    momentum, lr, /*dampening=*/0.0, nesterov, /*maximize=*/false, /*is_first_step=*/false);
  });
}

char *skep_adam(const skep_tensor *params, const skep_tensor *grads, const skep_tensor *exp_avgs,
                const skep_tensor *exp_avg_sqs, const skep_tensor *steps, size_t n, double lr, double beta1,
                double beta2, double weight_decay, double eps, bool decoupled) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    auto p = list(params, n), g = list(grads, n), m = list(exp_avgs, n), v = list(exp_avg_sqs, n), s = list(steps, n);
    std::vector<Tensor> no_max;
    at::_foreach_add_(s, 1.0);
    if (decoupled)
      at::_fused_adamw_(p, g, m, v, no_max, s, lr, beta1, beta2, weight_decay, eps, /*amsgrad=*/false, /*maximize=*/false);
    else
      at::_fused_adam_(p, g, m, v, no_max, s, lr, beta1, beta2, weight_decay, eps, /*amsgrad=*/false, /*maximize=*/false);
  });
}

char *skep_norm(const skep_tensor *tensors, size_t n, double *norm) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    *norm = n == 0 ? 0.0 : at::linalg_vector_norm(at::stack(at::_foreach_norm(list(tensors, n), 2)), 2).item<double>();
  });
}

char *skep_scaled(const skep_tensor *tensors, size_t n, double factor, skep_tensor *res) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    give(at::_foreach_mul(list(tensors, n), factor), res);
  });
}

char *skep_uniform(skep_tensor tensor, double low, double high, uint64_t seed) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    tensor->uniform_(low, high, at::detail::createCPUGenerator(seed));
  });
}

char *skep_from_blob(void *data, const int64_t *dims, size_t n_dims, int kind, void *ctx, skep_drop_fn drop,
                     skep_tensor *res) {
  std::shared_ptr<void> owner(ctx, drop);
  return guarded([&] {
    auto options = at::TensorOptions().dtype(static_cast<at::ScalarType>(kind));
    *res = new Tensor(at::from_blob(data, at::IntArrayRef(dims, n_dims), [owner](void *) {}, options));
  });
}

char *skep_inference_enter(void **guard) {
  return guarded([&] { *guard = new c10::InferenceMode(true); });
}
void skep_inference_leave(void *guard) { delete static_cast<c10::InferenceMode *>(guard); }
