#include "attention_bwd_sm80.cuh"

namespace fastsft::cuda {
template void launch_attention_dkv<BFloat16>(const BackwardArguments&, int64_t, void*);
}
