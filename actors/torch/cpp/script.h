// TorchScript modules beyond what tch 0.24 offers: buffers, keyword inputs, results in any structure. As in shim.h,
// every `char*` is null, or a message that the caller frees with free().
#pragma once
#include "shim.h"

extern "C" {
typedef struct skep_script skep_script;
typedef void (*skep_named_fn)(void *ctx, const char *name, skep_tensor tensor);

// Loads a module onto a device, as in "cpu" or "cuda:0", in training mode.
char *skep_script_load(const char *path, const char *device, skep_script **res);
void skep_script_free(skep_script *script);
// Calls `each` with every parameter, or with every buffer; it gets owned tensors that share the module's storage.
char *skep_script_state(const skep_script *script, bool buffers, void *ctx, skep_named_fn each);
// Runs forward. Calls `each` with every tensor of the result, depth first; names are empty.
char *skep_script_forward(skep_script *script, const skep_tensor *args, size_t n_args, const char *const *names,
                          const skep_tensor *kwargs, size_t n_kwargs, void *ctx, skep_named_fn each);
}
