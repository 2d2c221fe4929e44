// The floating types of parameters and gradients, for code that is free of torch headers.
#pragma once

namespace pecker_fast {

enum class ParamType { f32, bf16, fp16, f64 };

}  // namespace pecker_fast
