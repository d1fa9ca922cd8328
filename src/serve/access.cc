#include "serve/access.h"

#include <openssl/crypto.h>
#include <openssl/sha.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <fstream>

namespace servoflow::serve {
namespace {

std::array<std::uint8_t, 32> sha256(std::string_view text) {
  std::array<std::uint8_t, 32> hash{};
  ::SHA256(reinterpret_cast<const unsigned char*>(text.data()), text.size(), hash.data());
  return hash;
}

std::string_view trimmed(std::string_view text) {
  while (!text.empty() && (text.front() == ' ' || text.front() == '\t')) text.remove_prefix(1);
  while (!text.empty() && (text.back() == ' ' || text.back() == '\t' || text.back() == '\r'))
    text.remove_suffix(1);
  return text;
}

bool starts_with_word(std::string_view text, std::string_view word) {  // schemes have no case
  return text.size() > word.size() && text[word.size()] == ' ' &&
         std::equal(word.begin(), word.end(), text.begin(),
                    [](char a, char b) { return a == (b >= 'A' && b <= 'Z' ? b - 'A' + 'a' : b); });
}

}  // namespace

Status KeyRing::add(std::string_view key, const std::string& where) {
  // Never the key itself: messages end up in logs.
  if (key.size() < 8 || key.size() > 512)
    return Status::invalid(where + ": a key has 8 to 512 characters, this one " + std::to_string(key.size()));
  if (!std::all_of(key.begin(), key.end(), [](char c) { return c > 0x20 && c < 0x7f; }))
    return Status::invalid(where + ": a key holds printable characters without spaces");
  hashes_.push_back(sha256(key));
  return {};
}

Result<KeyRing> KeyRing::load(const std::string& path) {
  KeyRing ring;
  if (!path.empty()) {
    std::ifstream file(path);
    if (!file) return Status::invalid("--api-keys " + path + ": cannot be read: " + std::strerror(errno));
    std::string line;
    for (int number = 1; std::getline(file, line); ++number) {
      const std::string_view key = trimmed(line);
      if (key.empty() || key.front() == '#') continue;
      if (Status status = ring.add(key, "--api-keys " + path + ": line " + std::to_string(number));
          !status.ok())
        return status;
    }
    if (ring.empty()) return Status::invalid("--api-keys " + path + ": holds no key");
  }
  if (const char* key = std::getenv("SERVOFLOW_API_KEY"); key != nullptr && *key != '\0')
    if (Status status = ring.add(trimmed(key), "SERVOFLOW_API_KEY"); !status.ok()) return status;
  return ring;
}

bool KeyRing::admits(std::string_view authorization) const {
  if (hashes_.empty()) return true;
  std::string_view key;
  for (const std::string_view scheme : {"api-key", "bearer"})
    if (starts_with_word(authorization, scheme)) key = trimmed(authorization.substr(scheme.size()));
  const Hash given = sha256(key);
  int found = 0;
  for (const Hash& hash : hashes_)
    found |= ::CRYPTO_memcmp(hash.data(), given.data(), hash.size()) == 0 ? 1 : 0;
  return found != 0;
}

bool RateLimit::take(Clock::time_point now) {
  if (rate_ <= 0) return true;
  if (last_ != Clock::time_point{})
    tokens_ = std::min(most_, tokens_ + rate_ * std::chrono::duration<double>(now - last_).count());
  last_ = now;
  if (tokens_ < 1) return false;
  tokens_ -= 1;
  return true;
}

}  // namespace servoflow::serve
