#include "random.h"
#include "guarded.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Context.h>
#include <ATen/core/grad_mode.h>

namespace {

at::Generator generator(at::Device device, uint64_t seed) {
  if (device.is_cpu()) return at::detail::createCPUGenerator(seed);
  const auto &hooks = at::globalContext().getAcceleratorHooksInterface(device.type());
  auto made = hooks.getNewGenerator(device.index());
  made.set_current_seed(seed);
  return made;
}

} // namespace

char *skep_bernoulli(skep_tensor tensor, double p, uint64_t seed) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    tensor->bernoulli_(p, generator(tensor->device(), seed));
  });
}
