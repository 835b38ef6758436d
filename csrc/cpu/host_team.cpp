#include "host_team.h"

#include <dlfcn.h>

namespace fastsft {

HostTeam find_host_team() {
  void* torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
  if (torch == nullptr) return nullptr;
  // Searches libtorch_cpu and its dependencies, so the runtime found is the one torch's own regions run on.
  const auto team = reinterpret_cast<HostTeam>(dlsym(torch, "GOMP_parallel"));
  dlclose(torch);  // only the reference of this dlopen
  return team;
}

}  // namespace fastsft
