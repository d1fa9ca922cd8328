// One connection over a stream of bytes, plain or encrypted: instantiated once for each, in a file of its
// own.
#pragma once

#include <boost/asio/bind_executor.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/asio/strand.hpp>
#include <boost/asio/write.hpp>
#include <boost/beast/core.hpp>
#include <boost/beast/http.hpp>
#include <boost/beast/websocket.hpp>
#include <deque>
#include <memory>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "serve/connection.h"
#include "serve/frame_guard.h"
#include "serve/http_pages.h"
#include "serve/robot_link.h"

namespace servoflow::serve {

namespace beast = boost::beast;
namespace http = beast::http;
namespace websocket = beast::websocket;
namespace net = boost::asio;

template <class Stream>
class Connection final : public Transport, public Drainable {
 public:
  // `args` make the stream.
  template <class... Args>
  Connection(Context& context, std::string peer, Args&&... args)
      : context_(context),
        peer_(std::move(peer)),
        websocket_(FrameFollower(context.options.max_message_bytes,
                                 std::chrono::duration<double>(context.options.write_seconds)),
                   std::forward<Args>(args)...),
        timer_(websocket_.get_executor()) {}

  ~Connection() override { finish({}, "dropped"); }  // a handler that failed took the connection with it

  // The first call, for a stream that can be read at once.
  void read_http() {
    lowest().expires_after(seconds(context_.options.handshake_seconds));
    parser_.emplace();
    parser_->header_limit(16 * 1024);
    parser_->body_limit(1024);
    http::async_read(stream(), buffer_, *parser_,
                     [self = self()](beast::error_code error, std::size_t) { self->on_http(error); });
  }
  Stream& stream() { return websocket_.next_layer().next_layer(); }
  beast::tcp_stream& lowest() { return beast::get_lowest_layer(websocket_); }
  static std::chrono::milliseconds seconds(double value) {
    return std::chrono::milliseconds(static_cast<std::int64_t>(value * 1000));
  }

  void send(std::string message) override {
    outgoing_.push_back({Kind::kBinary, std::move(message), 0});
    write_next();
  }
  void close(std::string text, std::uint16_t code, std::string reason) override {
    if (!text.empty()) outgoing_.push_back({Kind::kText, std::move(text), 0});
    outgoing_.push_back({Kind::kClose, std::move(reason), code});
    write_next();
  }
  void post(std::function<void()> work) override { net::post(websocket_.get_executor(), std::move(work)); }
  void begin_drain() override {
    post([self = self()] {
      if (self->link_) self->link_->drain();
    });
  }

 private:
  enum class Kind { kBinary, kText, kClose };
  struct Outgoing {
    Kind kind;
    std::string bytes;
    std::uint16_t code;
  };

  std::shared_ptr<Connection> self() { return std::static_pointer_cast<Connection>(shared_from_this()); }

  void on_http(beast::error_code error) {
    if (error == beast::error::timeout) return finish(Cause::kTimeout, "no HTTP request came");
    if (error == http::error::end_of_stream || error == net::error::eof) return finish({}, "");
    if (error) return finish(Cause::kProtocol, "HTTP: " + error.message());
    request_ = parser_->release();
    const PageRequest page{.method = std::string(request_.method_string()),
                           .target = std::string(request_.target()),
                           .authorization = std::string(request_[http::field::authorization]),
                           .is_upgrade = websocket::is_upgrade(request_)};
    Page answer = answer_http(page, context_);
    // What a client sends before it knows that it may would be lost between the two protocols.
    if (answer.status == 101 && buffer_.size() > 0) {
      answer.status = 400;
      answer.body = "websocket: data before the handshake's answer\n";
      answer.cause = Cause::kProtocol;
    }
    if (answer.status == 101) return accept();
    if (answer.holds_place) --context_.robots;
    if (answer.cause) context_.metrics.fail(*answer.cause);
    auto response = std::make_shared<http::response<http::string_body>>(
        static_cast<http::status>(answer.status), request_.version());
    response->set(http::field::server, "servoflow");
    response->set(http::field::content_type, answer.content_type);
    if (answer.status == 401) response->set(http::field::www_authenticate, "Api-Key");
    if (answer.status == 426) response->set(http::field::upgrade, "websocket");
    response->keep_alive(false);
    response->body() = request_.method() == http::verb::head ? "" : std::move(answer.body);
    response->prepare_payload();
    http::async_write(stream(), *response,
                      [self = self(), response](beast::error_code, std::size_t) { self->linger(); });
  }

  void accept() {
    holds_place_ = true;
    lowest().expires_never();  // the websocket has its own clock from here on
    websocket_.set_option(websocket::stream_base::timeout{seconds(context_.options.handshake_seconds),
                                                          seconds(context_.options.idle_seconds), true});
    websocket_.set_option(websocket::stream_base::decorator(
        [](websocket::response_type& response) { response.set(http::field::server, "servoflow"); }));
    websocket_.read_message_max(context_.options.max_message_bytes);
    websocket_.auto_fragment(false);
    websocket_.async_accept(request_, [self = self()](beast::error_code error) {
      if (error) return self->finish(Cause::kProtocol, "websocket handshake: " + error.message());
      self->link_.emplace(self->context_, *self, self->peer_);
      self->link_->on_open();
      if (self->context_.draining) self->link_->drain();
      self->read();
    });
  }

  // A read is always under way: Beast answers pings inside it.
  void read() {
    websocket_.async_read(buffer_, [self = self()](beast::error_code error, std::size_t) {
      if (error) return self->on_read_error(error);
      const auto* data = static_cast<const std::uint8_t*>(self->buffer_.data().data());
      std::vector<std::uint8_t> message(data, data + self->buffer_.size());
      self->buffer_.consume(message.size());
      if (self->link_) self->link_->on_message(std::move(message), self->websocket_.got_text());
      self->read();
    });
  }

  void on_read_error(beast::error_code error) {
    const ServeOptions& options = context_.options;
    if (error == net::error::message_size || error == websocket::error::message_too_big)
      return fail_raw(Cause::kMessageSize,
                      "message: announces " + std::to_string(websocket_.next_layer().follower().announced()) +
                          " bytes; at most " + std::to_string(options.max_message_bytes) +
                          " (--max-message-mb)",
                      kMessageTooBig);
    if (error == net::error::timed_out)
      return fail_raw(Cause::kSlowClient,
                      "message: did not arrive within " + std::to_string(options.write_seconds) + " s",
                      kTryAgainLater);
    if (error == beast::error::timeout) return finish(Cause::kTimeout, "silent; did not answer pings");
    // Its own close, or ours: either way the ordinary end. Beast answers what breaks the protocol by itself.
    if (error == websocket::error::closed || error == net::error::eof ||
        error == net::error::connection_reset || error == net::error::operation_aborted ||
        error == net::error::broken_pipe)
      return finish({}, error.message());
    finish(Cause::kProtocol, "websocket: " + error.message());
  }

  void write_next() {
    if (writing_ || outgoing_.empty() || finished_) return;
    writing_ = true;
    const Outgoing& front = outgoing_.front();
    if (front.kind == Kind::kClose) {
      websocket::close_reason reason(front.code);
      reason.reason.assign(front.bytes.substr(0, reason.reason.max_size()));
      websocket_.async_close(
          reason, [self = self()](beast::error_code) { self->finish({}, "closed by the server"); });
      return;
    }
    timer_.expires_after(seconds(context_.options.write_seconds));
    timer_.async_wait([self = self()](beast::error_code error) {
      if (!error && self->writing_ && self->timer_.expiry() <= net::steady_timer::clock_type::now())
        self->finish(Cause::kSlowClient, "did not take a reply in time");
    });
    websocket_.text(front.kind == Kind::kText);
    websocket_.async_write(net::buffer(front.bytes), [self = self()](beast::error_code error, std::size_t) {
      self->timer_.cancel();
      if (error) {
        self->writing_ = false;
        // A failed write is only the echo of what the read reports, unless it is the first to notice.
        return self->raw_ ? void() : self->finish({}, error.message());
      }
      const bool was_reply = self->outgoing_.front().kind == Kind::kBinary;
      self->outgoing_.pop_front();
      self->writing_ = false;
      if (was_reply && self->link_) self->link_->on_sent();
      self->write_next();
    });
  }

  // Past the websocket, which has given up: a text frame and a close frame by hand, then the end.
  void fail_raw(Cause cause, const std::string& text, std::uint16_t code) {
    if (writing_ || finished_) return finish(cause, text);
    raw_ = writing_ = true;
    cause_ = cause;
    detail_ = text;
    auto frames = std::make_shared<std::string>();
    const auto frame = [&](int opcode, const std::string& body) {
      *frames += static_cast<char>(0x80 | opcode);
      if (body.size() < 126) {
        *frames += static_cast<char>(body.size());
      } else {
        *frames += static_cast<char>(126);
        *frames += static_cast<char>(body.size() >> 8);
        *frames += static_cast<char>(body.size() & 255);
      }
      *frames += body;
    };
    frame(1, text);
    frame(8, std::string{static_cast<char>(code >> 8), static_cast<char>(code & 255)} + text.substr(0, 120));
    lowest().expires_after(std::chrono::seconds(2));
    net::async_write(stream(), net::buffer(*frames),
                     [self = self(), frames](beast::error_code, std::size_t) { self->linger(); });
  }

  // Says goodbye, then reads until the client has closed: closing with unread data in the socket would tear
  // down what was just sent.
  void linger() {
    beast::error_code ignored;
    lowest().expires_after(std::chrono::seconds(2));
    if constexpr (std::is_same_v<Stream, beast::tcp_stream>)
      lowest().socket().shutdown(net::ip::tcp::socket::shutdown_send, ignored);
    discarded_.resize(64 * 1024);
    discard();
  }
  void discard() {
    stream().async_read_some(net::buffer(discarded_), [self = self()](beast::error_code error, std::size_t) {
      if (error) return self->finish(self->cause_, self->detail_);
      self->discard();
    });
  }

  void finish(std::optional<Cause> cause, const std::string& detail) {
    if (finished_) return;
    finished_ = true;
    timer_.cancel();
    lowest().close();
    outgoing_.clear();
    if (holds_place_) --context_.robots;
    if (link_) {
      link_->on_closed(cause, detail);
    } else if (cause) {
      context_.metrics.fail(*cause);
      context_.log.write(EventLog::Level::kWarn, "refused",
                         {{"peer", peer_}, {"cause", cause_name(*cause)}, {"reason", detail}});
    }
  }

  Context& context_;
  const std::string peer_;
  beast::flat_buffer buffer_;
  std::optional<http::request_parser<http::string_body>> parser_;
  http::request<http::string_body> request_;
  websocket::stream<FrameGuard<Stream>, false> websocket_;
  net::steady_timer timer_;
  std::optional<RobotLink> link_;
  std::deque<Outgoing> outgoing_;
  std::vector<char> discarded_;
  std::optional<Cause> cause_;
  std::string detail_;
  bool writing_ = false, finished_ = false, raw_ = false, holds_place_ = false;
};

std::string peer_name(const net::ip::tcp::socket& socket);

}  // namespace servoflow::serve
