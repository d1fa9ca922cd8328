#include "robot_client.h"

#include <algorithm>
#include <atomic>
#include <boost/asio/connect.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/post.hpp>
#include <boost/beast/core.hpp>
#include <boost/beast/websocket.hpp>
#include <condition_variable>
#include <mutex>
#include <optional>
#include <random>
#include <thread>
#include <utility>

#include "backoff.h"

namespace robot {
namespace {

namespace net = boost::asio;
namespace beast = boost::beast;
namespace websocket = beast::websocket;
using boost::system::error_code;

// The connection is gone and another one may help.
class Lost : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};
// stop() was called.
struct Ended {};

Clock::duration seconds(double value) {
  return std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(value));
}

void check_seconds(const char* name, double value) {
  if (!(value > 0 && value <= 86400))
    throw std::invalid_argument(std::string(name) + ": must be above 0 and at most 86400 seconds");
}

void check(const Address& address) {
  check_seconds("timeout_s", address.timeout_s);
  if (address.host.empty()) throw std::invalid_argument("host: is empty");
  if (address.host.find("://") != std::string::npos)
    throw std::invalid_argument(
        "host: a name or numeric address, without ws://; wss:// goes through a tunnel");
  const auto is_control = [](char c) { return static_cast<unsigned char>(c) <= 0x20 || c == 0x7f; };
  if (std::any_of(address.host.begin(), address.host.end(), is_control))
    throw std::invalid_argument("host: holds spaces");
  if (std::any_of(address.api_key.begin(), address.api_key.end(), is_control))
    throw std::invalid_argument("api_key: holds spaces or line ends");
}

// Close codes without a reason in text that repeating the same request would only meet again: the protocol,
// the kind of data, the policy, or the size of the message.
bool is_refusal(unsigned code) { return code == 1002 || code == 1003 || (code >= 1007 && code <= 1010); }
// Close codes behind a reason in text after which a reconnect helps.
bool try_again(unsigned code) { return code == 1001 || code == 1006 || code == 1012 || code == 1013; }

// One websocket to the server, driven by the thread that calls it. A read is always outstanding, so that
// pings are answered and a close is noticed between two requests. Calls end early with Ended once `ended` is
// set and wake() called.
class Link {
 public:
  Link(Address address, const std::atomic<bool>& ended) : address_(std::move(address)), ended_(ended) {
    const bool is_v6 = address_.host.find(':') != std::string::npos;
    name_ = (is_v6 ? "[" + address_.host + "]" : address_.host) + ":" + std::to_string(address_.port);
  }
  ~Link() { drop(); }

  void wake() {  // from any thread
    net::post(io_, [] {});
  }

  // Connects and returns the server's first message.
  std::string open() {
    drop();
    deadline_ = Clock::now() + seconds(address_.timeout_s);
    net::ip::tcp::resolver resolver(io_);
    net::ip::tcp::resolver::results_type endpoints;
    error_code error = perform(
        "look up the name",
        [&](auto done) {
          resolver.async_resolve(address_.host, std::to_string(address_.port),
                                 [&, done](error_code e, auto found) {
                                   endpoints = found;
                                   done(e);
                                 });
        },
        [&] { resolver.cancel(); });
    if (error) throw Lost(name_ + ": " + error.message());
    socket_.emplace(io_);
    beast::tcp_stream& stream = beast::get_lowest_layer(*socket_);
    const auto cancel = [&] { close_socket(); };
    error = perform(
        "connect",
        [&](auto done) { stream.async_connect(endpoints, [done](error_code e, const auto&) { done(e); }); },
        cancel);
    if (error) throw Lost(name_ + ": " + error.message());
    stream.socket().set_option(net::ip::tcp::no_delay(true), error);
    socket_->read_message_max(kMaxReply);
    socket_->binary(true);
    socket_->set_option(websocket::stream_base::decorator([this](websocket::request_type& request) {
      if (!address_.api_key.empty())
        request.set(beast::http::field::authorization, "Api-Key " + address_.api_key);
    }));
    websocket::response_type response;
    error = perform(
        "shake hands",
        [&](auto done) { socket_->async_handshake(response, name_, "/", [done](error_code e) { done(e); }); },
        cancel);
    if (error == websocket::error::upgrade_declined) {
      const std::string told =
          name_ + ": HTTP " + std::to_string(response.result_int()) + ": " + printable(response.body());
      if (response.result_int() == 503) throw Lost(told);
      throw Refused(told);  // 401 and the like: waiting mends nothing
    }
    if (error) throw Lost(name_ + ": " + error.message());
    start_read();
    Message first = receive("send its metadata");
    if (first.is_text) refuse(first.bytes);
    return std::move(first.bytes);
  }

  // Sends a request and returns the reply to it.
  std::string ask(const std::string& request) {
    deadline_ = Clock::now() + seconds(address_.timeout_s);
    if (read_done_) unexpected();
    const error_code error = perform(
        "take the request",
        [&](auto done) {
          socket_->async_write(net::buffer(request), [done](error_code e, std::size_t) { done(e); });
        },
        [&] { close_socket(); });
    // A server that refuses a request while it is being sent has said why: that is still to be read.
    if (error) deadline_ = std::min(deadline_, Clock::now() + std::chrono::seconds(1));
    Message reply = receive("reply");
    if (reply.is_text) refuse(reply.bytes);
    return std::move(reply.bytes);
  }

  // Waits until then; throws when the connection ends before.
  void idle_until(Clock::time_point then) {
    run_until(read_done_, then);
    if (ended_) throw Ended{};
    if (read_done_) unexpected();
  }

  // Waits until then, without a connection.
  void pause_until(Clock::time_point then) {
    const bool never = false;
    run_until(never, then);
  }

  // Ends the connection, if there is one: with a close frame when it is healthy and idle.
  void drop() {
    if (!socket_) return;
    if (reading_ && !asked_ && socket_->is_open()) {
      bool done = false;
      socket_->async_close(websocket::close_code::normal, [&](error_code) { done = true; });
      const Clock::time_point until = Clock::now() + std::chrono::milliseconds(300);
      while (!done && Clock::now() < until) io_.run_one_until(until);
      close_socket();
      while (!done) io_.run_one();
    }
    close_socket();
    while (reading_) io_.run_one();  // its handler writes to this object
    socket_.reset();
    read_done_ = asked_ = false;
  }

 private:
  static constexpr std::size_t kMaxReply = std::size_t{4} << 20;  // bytes; chunks have some thousand

  struct Message {
    bool is_text = false;
    std::string bytes;
  };

  // Runs handlers until one sets `done`, the time has come, or the client ends.
  void run_until(const bool& done, Clock::time_point then) {
    while (!done && !ended_ && Clock::now() < then) io_.run_one_until(then);
  }

  // Starts an operation and runs it to its end; at the deadline or on stop() `cancel` must make it end.
  template <class Start, class Cancel>
  error_code perform(const char* what, Start start, Cancel cancel) {
    bool done = false;
    error_code result;
    start([&done, &result](error_code error) {
      result = error;
      done = true;
    });
    run_until(done, deadline_);
    if (done) return result;
    cancel();
    while (!done) io_.run_one();  // its handler writes to this frame
    if (ended_) throw Ended{};
    throw Lost(name_ + " did not " + what + " within " + std::to_string(address_.timeout_s) + " s");
  }

  void close_socket() {
    error_code ignored;
    beast::get_lowest_layer(*socket_).socket().close(ignored);
  }

  void start_read() {
    incoming_.clear();
    reading_ = true;
    read_done_ = false;
    socket_->async_read(incoming_, [this](error_code error, std::size_t) {
      read_error_ = error;
      reading_ = false;
      read_done_ = true;
    });
  }

  // The next message; the read after it is already outstanding.
  Message receive(const char* what) {
    asked_ = true;  // until the answer is here
    run_until(read_done_, deadline_);
    if (ended_) throw Ended{};
    if (!read_done_) throw Lost(name_ + " did not " + what + " in time");
    if (read_error_) closed();
    Message out{socket_->got_text(), beast::buffers_to_string(incoming_.data())};
    asked_ = false;
    start_read();
    return out;
  }

  [[noreturn]] void closed() {
    if (read_error_ == websocket::error::closed) {
      const websocket::close_reason& reason = socket_->reason();
      const std::string told = name_ + " closed the connection with " + std::to_string(reason.code) + " " +
                               printable({reason.reason.data(), reason.reason.size()});
      if (is_refusal(reason.code)) throw Refused(told);
      throw Lost(told);
    }
    throw Lost(name_ + ": " + read_error_.message());
  }

  // A text frame is the reason for the close that follows; its code says whether to come back.
  [[noreturn]] void refuse(const std::string& text) {
    run_until(read_done_, deadline_);
    if (ended_) throw Ended{};
    const bool is_closed = read_done_ && read_error_ == websocket::error::closed;
    const bool is_broken = !read_done_ || (read_error_ && !is_closed);
    if (is_broken || (is_closed && try_again(socket_->reason().code)))
      throw Lost(name_ + ": " + printable(text));
    throw Refused(printable(text));
  }

  // Something came between two requests: the end of the connection, or what nobody asked for.
  [[noreturn]] void unexpected() {
    deadline_ = Clock::now() + seconds(address_.timeout_s);
    Message message = receive("close");
    if (message.is_text) refuse(message.bytes);
    throw BadReply(name_ + " sent a message that nobody asked for");
  }

  const Address address_;
  const std::atomic<bool>& ended_;
  std::string name_;  // host:port, for messages and the Host field
  net::io_context io_;
  net::executor_work_guard<net::io_context::executor_type> work_{io_.get_executor()};
  std::optional<websocket::stream<beast::tcp_stream>> socket_;
  beast::flat_buffer incoming_;
  Clock::time_point deadline_;
  bool reading_ = false;    // a read is outstanding
  bool read_done_ = false;  // it has ended: with read_error_, or with a message in incoming_
  bool asked_ = false;      // a reply is due
  error_code read_error_;
};

}  // namespace

struct RobotClient::Impl {
  explicit Impl(ClientOptions given)
      : options(std::move(given)), timeline(options.timeline), link(options.address, ended) {}

  void run() {
    Backoff backoff(options.first_pause_s, options.longest_pause_s, std::random_device{}());
    try {
      while (!ended) {
        try {
          serve(backoff);
        } catch (const Lost& lost) {
          const std::lock_guard guard(mutex);
          trouble = lost.what();
        }
        link.drop();
        link.pause_until(Clock::now() + seconds(backoff.next()));
      }
    } catch (const Ended&) {
    } catch (...) {
      const std::lock_guard guard(mutex);
      error = std::current_exception();
    }
    link.drop();
    changed.notify_all();
  }

  // One connection, until it is lost.
  void serve(Backoff& backoff) {
    std::map<std::string, std::string> told = decode_metadata(link.open());
    {
      const std::lock_guard guard(mutex);
      metadata = std::move(told);
      ++connects;
    }
    while (true) {
      const Clock::time_point begin = Clock::now();
      Actions actions = decode_actions(link.ask(encode(options.observe())));
      Clock::time_point next;
      {
        const std::lock_guard guard(mutex);
        add({std::move(actions), begin});
        ++chunks;
        next = timeline.next_observation();
      }
      changed.notify_all();
      backoff.reset();
      link.idle_until(next);
    }
  }

  void add(Chunk chunk) {
    try {
      timeline.add(std::move(chunk));
    } catch (const std::invalid_argument& wrong) {
      throw BadReply(wrong.what());
    }
  }

  void raise() const {  // with the mutex held
    if (error) std::rethrow_exception(error);
  }

  const ClientOptions options;
  std::atomic<bool> ended = false;
  mutable std::mutex mutex;  // guards what follows up to `link`; held for copies only, never while waiting
  mutable std::condition_variable changed;
  ActionTimeline timeline;
  std::exception_ptr error;
  std::map<std::string, std::string> metadata;
  std::string trouble;
  std::uint64_t connects = 0, chunks = 0;
  Link link;  // of the thread; wake() alone is called from others
  std::mutex thread_mutex;
  std::thread thread;
};

RobotClient::RobotClient(ClientOptions options) {
  check(options.address);
  if (!options.observe) throw std::invalid_argument("observe: is not set");
  check_seconds("first_pause_s", options.first_pause_s);
  check_seconds("longest_pause_s", options.longest_pause_s);
  if (options.longest_pause_s < options.first_pause_s)
    throw std::invalid_argument("longest_pause_s: is shorter than first_pause_s");
  impl_ = std::make_unique<Impl>(std::move(options));
}

RobotClient::~RobotClient() { stop(); }

void RobotClient::start() {
  const std::lock_guard guard(impl_->thread_mutex);
  if (impl_->ended || impl_->thread.joinable()) throw std::logic_error("start: a client starts once");
  impl_->thread = std::thread([impl = impl_.get()] { impl->run(); });
}

void RobotClient::stop() {
  impl_->ended = true;
  impl_->link.wake();
  const std::lock_guard guard(impl_->thread_mutex);
  // From within `observe` the thread cannot wait for itself: it ends behind it.
  if (impl_->thread.joinable() && impl_->thread.get_id() != std::this_thread::get_id()) impl_->thread.join();
}

Step RobotClient::action(Clock::time_point now) const {
  const std::lock_guard guard(impl_->mutex);
  impl_->raise();
  return impl_->timeline.at(now);
}

void RobotClient::wait_for_chunk(double timeout_s) const {
  std::unique_lock lock(impl_->mutex);
  const auto settled = [&] { return impl_->error || impl_->timeline.has_chunk(); };
  const bool in_time =
      impl_->changed.wait_until(lock, Clock::now() + seconds(std::clamp(timeout_s, 0.0, 86400.0)), settled);
  impl_->raise();
  if (in_time) return;
  const Address& address = impl_->options.address;
  throw std::runtime_error("no actions from " + address.host + ":" + std::to_string(address.port) +
                           " within " + std::to_string(timeout_s) + " s" +
                           (impl_->trouble.empty() ? "" : ": " + impl_->trouble));
}

Chunk RobotClient::chunk() const {
  const std::lock_guard guard(impl_->mutex);
  return impl_->timeline.chunk();
}
std::map<std::string, std::string> RobotClient::metadata() const {
  const std::lock_guard guard(impl_->mutex);
  return impl_->metadata;
}
std::string RobotClient::trouble() const {
  const std::lock_guard guard(impl_->mutex);
  return impl_->trouble;
}
std::uint64_t RobotClient::connects() const {
  const std::lock_guard guard(impl_->mutex);
  return impl_->connects;
}
std::uint64_t RobotClient::chunks() const {
  const std::lock_guard guard(impl_->mutex);
  return impl_->chunks;
}

struct Connection::Impl {
  explicit Impl(Address address) : link(std::move(address), never) {}
  const std::atomic<bool> never = false;
  Link link;
};

Connection::Connection(Address address) {
  check(address);
  impl_ = std::make_unique<Impl>(std::move(address));
  decode_metadata(impl_->link.open());
}
Connection::~Connection() = default;

Actions Connection::infer(const Observation& observation) {
  return decode_actions(impl_->link.ask(encode(observation)));
}

}  // namespace robot
