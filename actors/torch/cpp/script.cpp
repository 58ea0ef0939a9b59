#include "script.h"
#include "guarded.h"

#include <c10/core/InferenceMode.h>
#include <cstring>
#include <stdexcept>
#include <string>
#include <torch/script.h>
#include <unordered_map>
#include <vector>

struct skep_script {
  torch::jit::Module module;
};

namespace {

void flatten(const c10::IValue &value, void *ctx, skep_named_fn each) {
  if (value.isTensor()) {
    each(ctx, "", new at::Tensor(value.toTensor()));
  } else if (value.isTuple()) {
    for (const auto &item : value.toTupleRef().elements()) flatten(item, ctx, each);
  } else if (value.isTensorList()) {
    for (const at::Tensor &item : value.toTensorVector()) each(ctx, "", new at::Tensor(item));
  } else if (value.isList()) {
    for (const auto &item : value.toListRef()) flatten(item, ctx, each);
  } else if (value.isGenericDict()) {
    for (const auto &entry : value.toGenericDict()) flatten(entry.value(), ctx, each);
  } else {
    throw std::runtime_error("forward returned a " + value.tagKind() + " where a tensor is expected");
  }
}

// What a module keeps for later calls may not be made in inference mode: autograd could not use it.
struct NoInference {
  bool grad = at::GradMode::is_enabled() && !c10::InferenceMode::is_enabled();
  c10::InferenceMode off{false};
  at::AutoGradMode mode{grad};
};

} // namespace

char *skep_script_load(const char *path, const char *device, skep_script **res) {
  return guarded([&] {
    auto module = torch::jit::load(path, at::Device(std::string(device)));
    module.train(true);
    *res = new skep_script{std::move(module)};
  });
}

void skep_script_free(skep_script *script) { delete script; }

char *skep_script_state(const skep_script *script, bool buffers, void *ctx, skep_named_fn each) {
  return guarded([&] {
    if (buffers)
      for (const auto &named : script->module.named_buffers()) each(ctx, named.name.c_str(), new at::Tensor(named.value));
    else
      for (const auto &named : script->module.named_parameters())
        each(ctx, named.name.c_str(), new at::Tensor(named.value));
  });
}

char *skep_script_forward(skep_script *script, const skep_tensor *args, size_t n_args, const char *const *names,
                          const skep_tensor *kwargs, size_t n_kwargs, void *ctx, skep_named_fn each) {
  return guarded([&] {
    NoInference guard;
    std::vector<c10::IValue> positional;
    for (size_t i = 0; i < n_args; i++) positional.emplace_back(*args[i]);
    std::unordered_map<std::string, c10::IValue> keywords;
    for (size_t i = 0; i < n_kwargs; i++) keywords.emplace(names[i], *kwargs[i]);
    flatten(script->module.forward(std::move(positional), keywords), ctx, each);
  });
}
