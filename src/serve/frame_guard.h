// A stream layer below the websocket that reads along: it follows the frame headers and stops a message that
// is announced too large before a byte of it is stored, or that trickles in for too long. Beast would end
// such a connection too, but without a word; here the server still gets to say why.
#pragma once

#include <algorithm>
#include <boost/asio/async_result.hpp>
#include <boost/asio/buffer.hpp>
#include <boost/asio/error.hpp>
#include <boost/beast/core/async_base.hpp>
#include <boost/beast/core/error.hpp>
#include <boost/beast/websocket/teardown.hpp>
#include <chrono>
#include <cstdint>
#include <limits>
#include <span>
#include <utility>

namespace servoflow::serve {

// Follows the frames of one direction of a websocket (RFC 6455, 5.2).
class FrameFollower {
 public:
  using Clock = std::chrono::steady_clock;
  FrameFollower(std::uint64_t max_message, std::chrono::duration<double> max_time)
      : max_message_(max_message), max_time_(max_time) {}

  enum class Verdict { kFine, kTooBig, kTooSlow };
  Verdict follow(std::span<const std::uint8_t> bytes, Clock::time_point now) {
    while (!bytes.empty()) {
      if (left_ > 0) {
        const std::uint64_t skipped = std::min<std::uint64_t>(left_, bytes.size());
        left_ -= skipped;
        bytes = bytes.subspan(static_cast<std::size_t>(skipped));
      } else {
        header_[have_++] = bytes.front();
        bytes = bytes.subspan(1);
        if (have_ == header_size() && !take_header(now)) return Verdict::kTooBig;
      }
      if (left_ == 0 && have_ == 0 && final_) in_message_ = false;
    }
    return in_message_ && now - begun_ > max_time_ ? Verdict::kTooSlow : Verdict::kFine;
  }
  std::uint64_t announced() const { return announced_; }  // bytes of the message, as far as its frames told

 private:
  std::size_t header_size() const {
    if (have_ < 2) return 2;
    const int length = header_[1] & 127;
    return 2 + (length == 127 ? 8u : length == 126 ? 2u : 0u) + ((header_[1] & 128) != 0 ? 4u : 0u);
  }
  bool take_header(Clock::time_point now) {
    const int length = header_[1] & 127;
    std::uint64_t size = static_cast<std::uint64_t>(length);
    if (length >= 126) {
      size = 0;
      for (std::size_t i = 0; i < (length == 127 ? 8u : 2u); ++i) size = size << 8 | header_[2 + i];
    }
    have_ = 0;
    left_ = size;
    if ((header_[0] & 8) != 0)
      return length <= 125 || size <= max_message_;  // a control frame; Beast judges it
    if (!in_message_) {
      announced_ = 0;
      begun_ = now;
    }
    in_message_ = true;
    final_ = (header_[0] & 128) != 0;
    constexpr std::uint64_t kMost = std::numeric_limits<std::uint64_t>::max();
    announced_ = size > kMost - announced_ ? kMost : announced_ + size;
    return announced_ <= max_message_;
  }

  const std::uint64_t max_message_;
  const std::chrono::duration<double> max_time_;
  std::uint8_t header_[14] = {};
  std::size_t have_ = 0;
  std::uint64_t left_ = 0, announced_ = 0;
  bool in_message_ = false, final_ = false;
  Clock::time_point begun_;
};

template <class Next>
class FrameGuard {
 public:
  using next_layer_type = Next;
  using executor_type = typename Next::executor_type;

  template <class... Args>
  FrameGuard(FrameFollower follower, Args&&... args)
      : next_(std::forward<Args>(args)...), follower_(follower) {}
  executor_type get_executor() noexcept { return next_.get_executor(); }
  Next& next_layer() { return next_; }
  const Next& next_layer() const { return next_; }
  const FrameFollower& follower() const { return follower_; }

  // Fails with message_size or timed_out when the follower says so.
  template <class Buffers, class Handler>
  auto async_read_some(const Buffers& buffers, Handler&& handler) {
    return boost::asio::async_initiate<Handler, void(boost::beast::error_code, std::size_t)>(
        [this](auto&& h, const Buffers& b) {
          using Decayed = std::decay_t<decltype(h)>;
          ReadOp<Decayed, Buffers>(std::forward<decltype(h)>(h), *this, b);
        },
        handler, buffers);
  }
  template <class Buffers, class Handler>
  auto async_write_some(const Buffers& buffers, Handler&& handler) {
    return next_.async_write_some(buffers, std::forward<Handler>(handler));
  }

 private:
  template <class Handler, class Buffers>
  class ReadOp : public boost::beast::async_base<Handler, executor_type> {
   public:
    template <class H>
    ReadOp(H&& handler, FrameGuard& guard, const Buffers& buffers)
        : boost::beast::async_base<Handler, executor_type>(std::forward<H>(handler), guard.get_executor()),
          guard_(guard),
          buffers_(buffers) {
      guard_.next_.async_read_some(buffers_, std::move(*this));
    }
    void operator()(boost::beast::error_code error, std::size_t size) {
      const auto now = FrameFollower::Clock::now();
      std::size_t left = size;
      const auto end = boost::asio::buffer_sequence_end(buffers_);
      for (auto it = boost::asio::buffer_sequence_begin(buffers_); it != end && left > 0; ++it) {
        const boost::asio::const_buffer part = *it;
        const std::size_t here = std::min(left, part.size());
        left -= here;
        const auto verdict =
            guard_.follower_.follow({static_cast<const std::uint8_t*>(part.data()), here}, now);
        if (verdict == FrameFollower::Verdict::kTooBig) error = boost::asio::error::message_size;
        if (verdict == FrameFollower::Verdict::kTooSlow) error = boost::asio::error::timed_out;
        if (verdict != FrameFollower::Verdict::kFine) break;
      }
      this->complete_now(error, size);
    }

   private:
    FrameGuard& guard_;
    Buffers buffers_;
  };

  Next next_;
  FrameFollower follower_;
};

template <class Next>
void teardown(boost::beast::role_type role, FrameGuard<Next>& stream, boost::beast::error_code& error) {
  using boost::beast::websocket::teardown;
  teardown(role, stream.next_layer(), error);
}

template <class Next, class Handler>
void async_teardown(boost::beast::role_type role, FrameGuard<Next>& stream, Handler&& handler) {
  using boost::beast::websocket::async_teardown;
  async_teardown(role, stream.next_layer(), std::forward<Handler>(handler));
}

}  // namespace servoflow::serve
