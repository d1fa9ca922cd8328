#include "convert.h"

#include <nanobind/stl/string.h>

#include <utility>

namespace servoflow::python {
namespace {

// A numpy array [rows, columns] that takes the vector's memory over.
template <typename T>
nb::object to_numpy(std::vector<T>&& values, std::size_t rows, std::size_t columns) {
  auto* kept = new std::vector<T>(std::move(values));
  nb::capsule owner(kept, [](void* p) noexcept { delete static_cast<std::vector<T>*>(p); });
  return nb::cast(nb::ndarray<nb::numpy, T, nb::ndim<2>>(kept->data(), {rows, columns}, owner));
}

}  // namespace

void raise_status(const Status& status) {
  const char* const name = status.code() == StatusCode::kInvalidInput  ? "InvalidInput"
                           : status.code() == StatusCode::kCheckFailed ? "CheckFailed"
                                                                       : "RuntimeFailure";
  const nb::object type = nb::module_::import_("servoflow._errors").attr(name);
  // Messages quote what users sent, which need not be UTF-8.
  const std::string& text = status.message();
  const nb::object message =
      nb::steal(PyUnicode_DecodeUTF8(text.data(), static_cast<Py_ssize_t>(text.size()), "replace"));
  if (message.is_valid()) PyErr_SetObject(type.ptr(), message.ptr());
  throw nb::python_error();
}

Borrowed::Borrowed(const ObservationArgs& args) {
  for (const auto& [name, layout, pixels] : args.images) {
    ImageView view{.name = name, .layout = static_cast<ImageLayout>(layout)};
    view.bytes = {pixels.data(), pixels.size()};
    if (view.layout != ImageLayout::kEncoded) {
      if (pixels.ndim() != 3 || (view.layout != ImageLayout::kHWC && view.layout != ImageLayout::kCHW))
        raise_status(Status::invalid("image \"" + name + "\": not a picture of three dimensions"));
      const std::size_t first = view.layout == ImageLayout::kCHW ? 1 : 0;
      if (pixels.shape(first) > 1 << 20 || pixels.shape(first + 1) > 1 << 20)
        raise_status(Status::invalid("image \"" + name + "\": a side is longer than 2^20 pixels"));
      view.height = static_cast<int>(pixels.shape(first));
      view.width = static_cast<int>(pixels.shape(first + 1));
    }
    observation_.images.push_back(view);
  }
  observation_.state = {args.state.data(), args.state.size()};
  if (!args.prompt.is_none()) {
    prompt_ = nb::cast<std::string>(args.prompt);
    observation_.prompt = prompt_;
  }
  if (!args.tokens.is_none()) {
    tokens_ = nb::cast<TokenArray>(args.tokens);
    observation_.tokens = {tokens_.data(), tokens_.size()};
  }
}

nb::dict chunk_to_dict(ActionChunk chunk) {
  const auto rows = static_cast<std::size_t>(chunk.horizon);
  nb::dict timing;
  timing["infer_ms"] = chunk.times.total;
  timing["preprocess_ms"] = chunk.times.preprocess;
  timing["vision_ms"] = chunk.times.vision;
  timing["prefix_ms"] = chunk.times.prefix;
  timing["denoise_ms"] = chunk.times.denoise;
  timing["postprocess_ms"] = chunk.times.postprocess;
  timing["device_ms"] = chunk.times.device;
  nb::dict ran;
  ran["normalized"] = to_numpy(std::move(chunk.normalized), rows, static_cast<std::size_t>(chunk.model_dim));
  ran["request"] = chunk.request;
  ran["prefix_tokens"] = chunk.prefix_tokens;
  ran["prompt_truncated"] = chunk.prompt_truncated;
  ran["device"] = chunk.device;
  ran["backend"] = chunk.backend;
  ran["precision"] = chunk.precision;
  ran["contract_hash"] = chunk.contract_hash;
  nb::dict out;
  out["actions"] = to_numpy(std::move(chunk.actions), rows, static_cast<std::size_t>(chunk.action_dim));
  out["policy_timing"] = timing;
  out["servoflow"] = ran;
  return out;
}

}  // namespace servoflow::python
