#include "toolkit/digest.h"

#include <openssl/evp.h>

#include <cstdint>

#include "core/file.h"
#include "core/status_macros.h"
#include "weights/manifest.h"

namespace servoflow::toolkit {

struct Digest::State {
  EVP_MD_CTX* context = EVP_MD_CTX_new();
  ~State() { EVP_MD_CTX_free(context); }
};

Digest::Digest() : state_(std::make_unique<State>()) {
  EVP_DigestInit_ex(state_->context, EVP_sha256(), nullptr);
}
Digest::~Digest() = default;

void Digest::add(std::span<const std::byte> bytes) {
  EVP_DigestUpdate(state_->context, bytes.data(), bytes.size());
}

void Digest::add(std::string_view text) {
  const std::uint64_t size = text.size();
  add(std::as_bytes(std::span(&size, 1)));
  add(std::as_bytes(std::span(text.data(), text.size())));
}

std::string Digest::hex() {
  unsigned char out[EVP_MAX_MD_SIZE];
  unsigned int size = 0;
  EVP_DigestFinal_ex(state_->context, out, &size);
  std::string text;
  for (unsigned int i = 0; i < size; ++i) {
    text += "0123456789abcdef"[out[i] >> 4];
    text += "0123456789abcdef"[out[i] & 15];
  }
  return text;
}

Result<std::string> weights_digest(const weights::Checkpoint& checkpoint, const ProgressFunction& progress) {
  Digest digest;
  std::uint64_t done = 0;
  for (const weights::TensorSpec& spec : weights::manifest(checkpoint.architecture)) {
    SF_ASSIGN_OR_RETURN(const weights::TensorData tensor, checkpoint.source->get(spec.name));
    digest.add(spec.name);
    digest.add(dtype_name(tensor.dtype));
    digest.add(tensor.shape.to_string());
    digest.add(tensor.bytes);
    checkpoint.source->release(spec.name);
    done += static_cast<std::uint64_t>(spec.shape.elements());
    if (progress) progress(done, checkpoint.parameters);
  }
  return digest.hex();
}

Result<std::string> file_digest(const std::string& path) {
  SF_ASSIGN_OR_RETURN(const MappedFile file, MappedFile::open(path));
  Digest digest;
  digest.add(file.bytes());
  return digest.hex();
}

}  // namespace servoflow::toolkit
