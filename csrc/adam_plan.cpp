// The work of an optimizer step for each of many parameters, without Python: check that they are still those that the
// lists for masked_adam_ were made from, take their gradients, and run the operator.
// pecker_fast/adam/buckets.py and watch.py use these classes, and do the same in Python if this library is missing.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/custom_class.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "adam_cpu.h"

namespace pecker_fast {
namespace {

using at::Tensor;
using at::TensorList;
using OptionalTensors = c10::List<std::optional<Tensor>>;
using Tensors = std::vector<Tensor>;
using Positions = std::vector<std::int64_t>;

// Address and layout of a tensor's entries.
class Memory {
 public:
  explicit Memory(const c10::TensorImpl& t)
      : data_(t.data()), type_(t.dtype()), device_(t.device()), negative_(is_negative(t)), sizes_(t.sizes()),
        strides_(t.strides()) {}

  bool is_of(const c10::TensorImpl& t) const {
    return t.data() == data_ && t.dtype() == type_ && t.device() == device_ && is_negative(t) == negative_ &&
           t.sizes() == sizes_ && t.strides() == strides_;
  }

 private:
  static bool is_negative(const c10::TensorImpl& t) { return t.key_set().has(c10::DispatchKey::Negative); }

  const void* data_;
  caffe2::TypeMeta type_;
  c10::Device device_;
  bool negative_;
  c10::SmallVector<std::int64_t, 5> sizes_, strides_;
};

// The Python object of a tensor; null if this version of torch has no access to it.
template <typename Slot>
auto python_object(const Slot& slot, int) -> decltype(static_cast<const void*>(slot.load_pyobj())) {
  return slot.load_pyobj();
}
template <typename Slot>
auto python_object(const Slot& slot, long) -> decltype(static_cast<const void*>(slot._unchecked_untagged_pyobj())) {
  return slot._unchecked_untagged_pyobj();
}
template <typename Slot>
const void* python_object(const Slot&, ...) {
  return nullptr;
}

// The parameters of an optimizer, in order. Python compares the objects; passing them on at each step would cost more
// than all of collect.
class ParameterWatch : public torch::CustomClassHolder {
 public:
  // Results of collect.
  enum Outcome : std::int64_t { kAsExpected = 0, kEdited = 1, kOtherGradients = 2 };

  explicit ParameterWatch(const Tensors& params) : present_(params.size(), true), grads_(params.size(), nullptr) {
    parameters_.reserve(params.size());
    for (const Tensor& param : params) parameters_.emplace_back(param);
  }

  // The parameters that have a gradient of either kind.
  void expect(const c10::List<bool>& present) { present_.assign(present.begin(), present.end()); }

  // From now on gradients are packed: `packed` is each one as it is in the parameter's .grad, `values` are its entries.
  void pack(const Tensors& packed, Tensors values) {
    TORCH_CHECK_VALUE(packed.size() == parameters_.size() && values.size() == parameters_.size(),
                      "packed gradients and parameters differ in number");
    packed_ = packed;
    values_ = std::move(values);
  }

  // Whether the parameters still have the same memory.
  bool is_current() const {
    for (const Parameter& parameter : parameters_) {
      if (!parameter.is_current()) return false;
    }
    return true;
  }

  // Takes the gradients; `masked_grads`: one or none for each parameter, or an empty list. kEdited: a parameter has
  // other memory. kOtherGradients: other parameters than expected have gradients, or one does not fit.
  std::int64_t collect(const OptionalTensors& masked_grads) {
    release();
    const bool joint = !masked_grads.empty();
    bool expected = !joint || masked_grads.size() == parameters_.size();
    for (std::size_t i = 0; i < parameters_.size(); ++i) {
      if (!parameters_[i].is_current()) return kEdited;
      if (!expected) continue;
      c10::TensorImpl& param = *parameters_[i].impl;
      const Tensor& grad = param.grad();
      if (joint) masked_grads_.push_back(masked_grads.get(i).value_or(Tensor()));
      const bool present = grad.defined() || (joint && masked_grads_[i].defined());
      const bool is_packed = !packed_.empty() && grad.defined();
      expected = present == present_[i] && (!joint || fits(masked_grads_[i], param)) &&
                 (is_packed ? grad.is_same(packed_[i]) : fits(grad, param));
      grads_[i] = is_packed ? &values_[i] : &grad;
    }
    if (!expected) return kOtherGradients;
    collected_ = true;
    return kAsExpected;
  }

  // Releases the gradients.
  void release() {
    masked_grads_.clear();
    collected_ = false;
  }

  // Positions of the parameters that other code has written to since the last step.
  Positions written() const {
    Positions positions;
    for (std::size_t i = 0; i < parameters_.size(); ++i) {
      if (version_of(*parameters_[i].impl) != parameters_[i].version) positions.push_back(static_cast<std::int64_t>(i));
    }
    return positions;
  }

  // Makes the parameters' present values those of the last step.
  void record() {
    for (Parameter& parameter : parameters_) parameter.version = version_of(*parameter.impl);
  }

  // Tells autograd that a step has written to these parameters.
  void bump(const Positions& positions) {
    for (const std::int64_t i : positions) {
      Parameter& parameter = parameters_[i];
      if (!parameter.impl->is_inference()) parameter.impl->bump_version();
      parameter.version = version_of(*parameter.impl);
    }
  }

  // Undefined if there is none.
  const Tensor& grad(std::int64_t i) const { return *grads_[i]; }
  const Tensor& masked_grad(std::int64_t i) const { return masked_grads_[i]; }
  bool has_collected() const { return collected_; }

 private:
  struct Parameter {
    explicit Parameter(const Tensor& t)
        : impl(t.unsafeGetTensorImpl()), object(python_object(*impl->pyobj_slot(), 0)), memory(*impl),
          version(version_of(*impl)) {
      // torch.utils.swap_tensors takes a tensor that only Python and its gradient accumulator refer to.
      if (t.requires_grad() && t.is_leaf()) {
        accumulator = torch::autograd::impl::grad_accumulator(t);
      } else {
        reference = t;
      }
    }

    // swap_tensors gives the Python object another impl, and this impl another object.
    bool is_current() const {
      return python_object(*impl->pyobj_slot(), 0) == object && memory.is_of(*impl);
    }

    c10::TensorImpl* impl;
    const void* object;
    decltype(torch::autograd::impl::grad_accumulator(std::declval<const Tensor&>())) accumulator;
    Tensor reference;
    Memory memory;
    std::int64_t version;
  };

  static std::int64_t version_of(c10::TensorImpl& t) {
    return t.is_inference() ? 0 : static_cast<std::int64_t>(t.version_counter().current_version());
  }

  static bool fits(const Tensor& grad, const c10::TensorImpl& param) {
    return !grad.defined() ||
           (grad.dtype() == param.dtype() && grad.layout() == at::kStrided && grad.device() == param.device() &&
            grad.sizes() == param.sizes() && !grad.key_set().has(c10::DispatchKey::Python));
  }

  std::vector<Parameter> parameters_;
  std::vector<bool> present_;
  Tensors packed_, values_;
  // Pointers of one step. The parameters own the gradients.
  std::vector<const Tensor*> grads_;
  Tensors masked_grads_;
  bool collected_ = false;
};

using MaskedAdam = void(TensorList, const OptionalTensors&, const OptionalTensors&, TensorList, TensorList, TensorList,
                        TensorList, TensorList, TensorList, const Tensor&, const Tensor&, const std::optional<Tensor>&,
                        const std::optional<Tensor>&, at::IntArrayRef, const std::optional<Tensor>&,
                        const std::optional<Tensor>&, const std::optional<Tensor>&, double, double, double, double,
                        bool, bool, std::optional<double>, std::optional<double>, bool, bool, std::optional<double>,
                        bool, bool, std::int64_t, at::IntArrayRef);

// The lists of one call of masked_adam_. A step brings gradients, step counts and two scalars.
class AdamPlan : public torch::CustomClassHolder {
 public:
  // positions: of the parameters among those watched. params: contiguous, as the kernel takes them. orders: for each of
  // them the dimensions of its gradients from the slowest to the fastest in memory; empty: row-major.
  // state: exp_avgs, exp_avg_sqs, max_exp_avg_sqs, masters, emas and counts. packed_grads: the watch was given packed
  // gradients.
  AdamPlan(Positions positions, Tensors params, std::vector<Positions> orders, std::vector<Tensors> state,
           bool packed_grads)
      : positions_(std::move(positions)), params_(std::move(params)), orders_(std::move(orders)),
        state_(std::move(state)), packed_grads_(packed_grads) {
    TORCH_CHECK_VALUE(state_.size() == 6, "state has ", state_.size(), " lists, expected 6");
    TORCH_CHECK_VALUE(params_.size() == positions_.size() && orders_.size() == positions_.size(),
                      "params, orders and positions differ in length");
  }

  // The tensors of the optimizer's state: other code can give them other memory.
  void watch(const Tensors& tensors) {
    watched_.clear();
    for (const Tensor& tensor : tensors) watched_.emplace_back(tensor);
  }

  bool is_current() const {
    for (const Watched& watched : watched_) {
      if (!watched.is_current()) return false;
    }
    return true;
  }

  // Constant from step to step.
  void configure(bool joint, const Tensor& lr, const std::optional<Tensor>& bias_table,
                 const std::optional<Tensor>& words, Positions word_offsets,
                 const std::optional<Tensor>& packed_offsets, double beta1, double beta2, double eps,
                 double weight_decay, bool decoupled_weight_decay, bool maximize, std::optional<double> clip_value,
                 std::optional<double> max_update, bool retain_variance, bool zero_nonfinite,
                 std::optional<double> ema_decay, bool ema_everywhere, bool stochastic_rounding, std::int64_t seed) {
    joint_ = joint;
    lr_ = lr;
    bias_table_ = bias_table;
    words_ = words;
    word_offsets_ = std::move(word_offsets);
    packed_offsets_ = packed_offsets;
    options_ = {beta1,      beta2,      eps,        weight_decay,    decoupled_weight_decay,
                maximize,   clip_value, max_update, retain_variance, zero_nonfinite,
                ema_decay,  ema_everywhere, stochastic_rounding, seed};
    if (params_[0].is_cpu()) {
      table_ = AdamTable::make({params_, state_[0], state_[1], state_[2], state_[3], state_[4], state_[5], bias_table_,
                                words_, word_offsets_, packed_offsets_, positions_},
                               options_, joint_, packed_grads_);
    }
  }

  // Steps with the gradients that `watch` has collected.
  void run(const c10::intrusive_ptr<ParameterWatch>& watch, const Tensor& steps,
           const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& found_inf) {
    TORCH_CHECK(watch->has_collected() && lr_.defined(), "run() before collect() or configure()");
    // The kernels have no derivatives; without this every argument would pass through autograd's boxed fallback.
    const at::AutoDispatchBelowADInplaceOrView guard;
    table_ != nullptr ? run_table(*watch, steps, grad_scale, found_inf)
                      : run_operator(*watch, steps, grad_scale, found_inf);
    watch->bump(positions_);
  }

 private:
  class Watched {
   public:
    explicit Watched(const Tensor& t)
        : tensor_(t), data_(t.const_data_ptr()), numel_(t.numel()), type_(t.scalar_type()),
          contiguous_(t.is_contiguous()) {
      if (!contiguous_) strides_ = t.strides().vec();
    }

    bool is_current() const {
      const Tensor& t = tensor_;
      return t.const_data_ptr() == data_ && t.numel() == numel_ && t.scalar_type() == type_ &&
             (contiguous_ ? t.is_contiguous() : t.strides() == strides_);
    }

   private:
    Tensor tensor_;
    const void* data_;
    std::int64_t numel_;
    at::ScalarType type_;
    bool contiguous_;
    std::vector<std::int64_t> strides_;
  };

  void run_table(const ParameterWatch& watch, const Tensor& steps, const std::optional<Tensor>& grad_scale,
                 const std::optional<Tensor>& found_inf) {
    Tensors copies;
    const auto point_to = [&](const Tensor& grad, std::size_t i) -> const void* {
      if (!grad.defined()) return nullptr;
      if (is_laid_out(grad, i)) return gradient_data(grad);
      copies.push_back(laid_out(grad, i));
      return gradient_data(copies.back());
    };
    grads_.resize(positions_.size());
    for (std::size_t i = 0; i < positions_.size(); ++i) grads_[i] = point_to(watch.grad(positions_[i]), i);
    masked_grads_.resize(joint_ ? positions_.size() : 0);
    for (std::size_t i = 0; i < masked_grads_.size(); ++i) {
      masked_grads_[i] = point_to(watch.masked_grad(positions_[i]), i);
    }
    table_->step({grads_, masked_grads_}, steps, lr_, grad_scale, found_inf);
  }

  void run_operator(const ParameterWatch& watch, const Tensor& steps, const std::optional<Tensor>& grad_scale,
                    const std::optional<Tensor>& found_inf) {
    static const auto op =
        c10::Dispatcher::singleton().findSchemaOrThrow("pecker_fast::masked_adam_", "").typed<MaskedAdam>();
    const auto optional = [&](const Tensor& grad, std::size_t i) -> std::optional<Tensor> {
      if (!grad.defined()) return std::nullopt;
      return is_laid_out(grad, i) ? grad : laid_out(grad, i);
    };
    OptionalTensors grads, masked_grads;
    grads.reserve(positions_.size());
    for (std::size_t i = 0; i < positions_.size(); ++i) grads.push_back(optional(watch.grad(positions_[i]), i));
    for (std::size_t i = 0; joint_ && i < positions_.size(); ++i) {
      masked_grads.push_back(optional(watch.masked_grad(positions_[i]), i));
    }
    const AdamOptions& o = options_;
    op.call(params_, grads, masked_grads, state_[0], state_[1], state_[2], state_[3], state_[4], state_[5], steps, lr_,
            bias_table_, words_, word_offsets_, packed_offsets_, grad_scale, found_inf, o.beta1, o.beta2, o.eps,
            o.weight_decay, o.decoupled_weight_decay, o.maximize, o.clip_value, o.max_update, o.retain_variance,
            o.zero_nonfinite, o.ema_decay, o.ema_everywhere, o.stochastic_rounding, o.seed, positions_);
  }

  // Whether the kernel can take a gradient as it is: contiguous, in the parameter's order, not a lazy view.
  bool is_laid_out(const Tensor& grad, std::size_t i) const {
    return orders_[i].empty() && grad.is_contiguous() && !grad.is_neg() && !grad.is_conj();
  }

  Tensor laid_out(const Tensor& grad, std::size_t i) const {
    const Tensor values = grad.resolve_neg().resolve_conj();
    return orders_[i].empty() ? values.contiguous() : values.permute(orders_[i]).reshape({-1}).contiguous();
  }

  Positions positions_;
  Tensors params_;
  std::vector<Positions> orders_;
  std::vector<Tensors> state_;
  bool packed_grads_;
  std::vector<Watched> watched_;
  bool joint_ = false;
  Tensor lr_;
  std::optional<Tensor> bias_table_, words_, packed_offsets_;
  Positions word_offsets_;
  AdamOptions options_{};
  std::unique_ptr<AdamTable> table_;  // for parameters on the CPU
  std::vector<const void*> grads_, masked_grads_;
};

TORCH_LIBRARY_FRAGMENT(pecker_fast, m) {
  m.class_<ParameterWatch>("ParameterWatch")
      .def(torch::init<const Tensors&>())
      .def("expect", &ParameterWatch::expect)
      .def("pack", &ParameterWatch::pack)
      .def("is_current", &ParameterWatch::is_current)
      .def("collect", &ParameterWatch::collect)
      .def("release", &ParameterWatch::release)
      .def("written", &ParameterWatch::written)
      .def("record", &ParameterWatch::record)
      .def("bump", &ParameterWatch::bump);
  m.class_<AdamPlan>("AdamPlan")
      .def(torch::init<Positions, Tensors, std::vector<Positions>, std::vector<Tensors>, bool>())
      .def("watch", &AdamPlan::watch)
      .def("is_current", &AdamPlan::is_current)
      .def("configure", &AdamPlan::configure)
      .def("run", &AdamPlan::run);
}

}  // namespace
}  // namespace pecker_fast
