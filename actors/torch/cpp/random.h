// Random numbers from generators of their own. tch 0.24 offers only the process's, which all experts would share.
// As in shim.h, every `char*` is null, or a message that the caller frees with free().
#pragma once
#include "shim.h"

extern "C" {
// Fills a tensor with ones, each with probability p, and zeros, from a generator on its device that is seeded for it.
char *skep_bernoulli(skep_tensor tensor, double p, uint64_t seed);
}
