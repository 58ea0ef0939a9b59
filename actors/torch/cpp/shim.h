// What tch 0.24 does not offer: an autograd node with a foreign closure, vector-Jacobian products, fused optimizers,
// tensors over borrowed bytes. Every `char*` is null, or a message that the caller frees with free().
#pragma once
#include <ATen/ATen.h>
#include <cstddef>
#include <cstdint>

extern "C" {
typedef at::Tensor *skep_tensor;

// Fills res (n_in, owned tensors or null) from grads (n_out, borrowed, null when undefined). needs: which of res are used.
typedef char *(*skep_backward_fn)(void *ctx, const skep_tensor *grads, size_t n_out, const uint8_t *needs,
                                  skep_tensor *res, size_t n_in);
typedef void (*skep_drop_fn)(void *ctx);

// Makes outs (borrowed) results of a node over ins (borrowed): res gets owned tensors that share outs' storage. Owns ctx
// in every case and drops it once, with the graph or right after a backward that does not keep the graph.
char *skep_attach(const char *name, const skep_tensor *ins, size_t n_in, const skep_tensor *outs, size_t n_out,
                  skep_tensor *res, void *ctx, skep_backward_fn backward, skep_drop_fn drop);

// Gradients of sum(outs * grads) with respect to ins, never through .grad; res is null where an input is unused.
char *skep_vjp(const skep_tensor *outs, const skep_tensor *grads, size_t n_out, const skep_tensor *ins, size_t n_in,
               skep_tensor *res);

// One step in place on params. momenta may be null when momentum is 0.
char *skep_sgd(const skep_tensor *params, const skep_tensor *grads, const skep_tensor *momenta, size_t n, double lr,
               double momentum, double weight_decay, bool nesterov);
// One step of Adam, or of AdamW when decoupled. steps: scalar float32 tensors, incremented here.
char *skep_adam(const skep_tensor *params, const skep_tensor *grads, const skep_tensor *exp_avgs,
                const skep_tensor *exp_avg_sqs, const skep_tensor *steps, size_t n, double lr, double beta1,
                double beta2, double weight_decay, double eps, bool decoupled);
// L2 norm of all tensors together.
char *skep_norm(const skep_tensor *tensors, size_t n, double *norm);
// res: owned copies times factor.
char *skep_scaled(const skep_tensor *tensors, size_t n, double factor, skep_tensor *res);

// Fills a CPU tensor with uniform values from a generator of its own.
char *skep_uniform(skep_tensor tensor, double low, double high, uint64_t seed);
// A tensor over foreign memory; drop(ctx) is called once, when the last tensor on it goes or when this fails.
char *skep_from_blob(void *data, const int64_t *dims, size_t n_dims, int kind, void *ctx, skep_drop_fn drop,
                     skep_tensor *res);

char *skep_inference_enter(void **guard);
void skep_inference_leave(void *guard);
}
