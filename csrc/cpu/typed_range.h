// For one instruction set, in namespace PF_ISA. No include guard: see simd.h.
namespace pecker_fast {
namespace PF_ISA {

// Calls body(data) with the type of the range's entries.
template <typename Body>
inline auto with_type(const ScanRange& range, const Body& body) {
  switch (range.type) {
    case ParamType::bf16:
      return body(static_cast<const bf16*>(range.data));
    case ParamType::fp16:
      return body(static_cast<const fp16*>(range.data));
    default:
      return body(static_cast<const float*>(range.data));
  }
}

}  // namespace PF_ISA
}  // namespace pecker_fast
