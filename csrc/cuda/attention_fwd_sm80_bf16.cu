#include "attention_fwd_sm80.cuh"

namespace fastsft::cuda {
template void launch_attention_forward<BFloat16>(const ForwardArguments&, int64_t, void*);
}
