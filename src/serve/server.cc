#include "serve/server.h"

#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/signal_set.hpp>
#include <boost/asio/ssl/context.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/asio/strand.hpp>
#include <csignal>
#include <cstdlib>
#include <nlohmann/json.hpp>
#include <random>
#include <thread>
#include <vector>

#include "serve/connection.h"

namespace servoflow::serve {
namespace {

namespace net = boost::asio;
using tcp = net::ip::tcp;
using Level = EventLog::Level;
using boost::system::error_code;

// Connections beyond the robots': health checks, metrics, and clients about to be refused.
constexpr std::size_t kSpareConnections = 64;
// Requests in flight keep the sessions of robots that have gone.
constexpr int kSpareSessions = 64;

Status check(const ServeOptions& o) {
  if (o.cert.empty() != o.key.empty()) return Status::invalid("--cert and --key: TLS needs both");
  if (!o.metadata_json.empty()) {
    const nlohmann::json metadata = nlohmann::json::parse(o.metadata_json, nullptr, false);
    if (!metadata.is_object()) return Status::invalid("--metadata: not a JSON object");
  }
  return {};
}

std::string random_prefix() {
  std::random_device device;
  char text[9];
  std::snprintf(text, sizeof text, "%08x", static_cast<unsigned>(device()));
  return text;
}

// A set that lives as long as the process: when the last set lets a signal go, the signal kills again, and a
// second SIGTERM between the server's end and the process's would turn a clean end into a kill.
void keep_signals() {
  static auto* const io = new net::io_context;
  static auto* const kept = new net::signal_set(*io, SIGTERM, SIGINT, SIGHUP);
  static_cast<void>(kept);
}

class Server {
 public:
  Server(const ServeOptions& options, KeyRing keys)
      : options_(options),
        context_(options, std::move(keys)),
        io_(options.io_threads),
        acceptor_(io_),
        signals_(io_),
        drain_timer_(io_) {}
  ~Server() {
    if (reloader_.joinable()) reloader_.join();
  }

  Status run(const std::function<void(const std::string&)>& ready) {
    context_.trace_prefix = random_prefix();
    context_.metadata_json = options_.metadata_json;
    if (Status status = load_tls(); !status.ok()) return status;
    if (Status status = bind(); !status.ok()) return status;
    if (!options_.record.empty()) {
      Result<std::unique_ptr<Recorder>> recorder =
          Recorder::open(options_.record, options_.record_limit, context_.metrics, context_.log);
      if (!recorder.ok()) return recorder.status();
      context_.recorder = std::move(*recorder);
    }
    Result<std::shared_ptr<PolicyHost>> host = open_host(1);
    if (!host.ok()) return host.status();
    context_.set_host(*host);
    error_code error;
    acceptor_.listen(net::socket_base::max_listen_connections, error);
    if (error) return Status::runtime(address_ + ": cannot listen: " + error.message());
    tell_start(**host);
    host->reset();
    watch_signals();
    accept();
    ready(url());

    std::vector<std::thread> threads;
    for (int i = 1; i < options_.io_threads; ++i) threads.emplace_back([this] { run_handlers(); });
    run_handlers();
    for (std::thread& thread : threads) thread.join();
    // A batch or a reload that takes longer than robots were promised cannot be interrupted.
    if (context_.scheduler.pending() > 0 || reloading_) {
      context_.log.write(Level::kError, "stopped", {{"unfinished", context_.scheduler.pending()}});
      context_.log.close();
      std::_Exit(0);
    }
    context_.scheduler.stop();
    context_.recorder.reset();
    context_.log.write(
        Level::kInfo, "stopped",
        {{"requests", context_.metrics.requests.load()}, {"replies", context_.metrics.replies.load()}});
    return {};
  }

 private:
  // Nothing of ours throws; what arrives here is the standard library out of memory, in the handler of one
  // connection, which ends with it.
  void run_handlers() {
    while (true) {
      try {
        io_.run();
        return;
      } catch (const std::exception& error) {
        context_.log.write(Level::kError, "handler_failed", {{"reason", error.what()}});
      }
    }
  }

  std::string url() const { return (tls_ ? "wss://" : "ws://") + address_; }

  Result<std::shared_ptr<PolicyHost>> open_host(std::uint64_t generation) const {
    HostOptions host{.checkpoint = options_.checkpoint,
                     .policy = options_.policy,
                     .seed = options_.seed,
                     .sessions = options_.max_connections + kSpareSessions};
    host.policy.robot = options_.robot;
    host.policy.max_batch = options_.max_batch;
    return PolicyHost::open(host, generation);
  }

  Status load_tls() {
    if (options_.cert.empty()) return {};
    tls_.emplace(net::ssl::context::tls_server);
    error_code error;
    tls_->set_options(net::ssl::context::default_workarounds | net::ssl::context::no_sslv2 |
                          net::ssl::context::no_sslv3 | net::ssl::context::no_tlsv1 |
                          net::ssl::context::no_tlsv1_1,
                      error);
    if (!error) tls_->use_certificate_chain_file(options_.cert, error);
    if (error) return Status::invalid("--cert " + options_.cert + ": " + error.message());
    tls_->use_private_key_file(options_.key, net::ssl::context::pem, error);
    if (error) return Status::invalid("--key " + options_.key + ": " + error.message());
    return {};
  }

  // Taken before the checkpoint is opened, so that a port in use is told at once; listened on when all is
  // ready.
  Status bind() {
    error_code error;
    const std::string port = std::to_string(options_.port);
    const auto found = tcp::resolver(io_).resolve(options_.host, port, tcp::resolver::passive, error);
    if (error) return Status::invalid("--host " + options_.host + ": " + error.message());
    const tcp::endpoint endpoint = *found.begin();
    acceptor_.open(endpoint.protocol(), error);
    if (!error) acceptor_.set_option(net::socket_base::reuse_address(true), error);
    if (!error) acceptor_.bind(endpoint, error);
    if (error) return Status::invalid("--port " + port + " on " + options_.host + ": " + error.message());
    const tcp::endpoint bound = acceptor_.local_endpoint(error);
    const std::string host =
        bound.address().is_v6() ? "[" + bound.address().to_string() + "]" : bound.address().to_string();
    address_ = host + ":" + std::to_string(bound.port());
    loopback_ = bound.address().is_loopback();
    return {};
  }

  void tell_start(const PolicyHost& host) {
    const PolicyInfo& info = host.info();
    context_.log.write(Level::kInfo, "listening",
                       {{"url", url()},
                        {"checkpoint", info.checkpoint},
                        {"robot", host.schema()->robot},
                        {"contract_hash", host.contract_hash()},
                        {"device", info.device},
                        {"backend", info.backend},
                        {"precision", info.precision},
                        {"ready_s", info.ready_seconds},
                        {"max_connections", options_.max_connections},
                        {"max_batch", info.max_batch},
                        {"api_keys", !context_.keys.empty()}});
    if (!loopback_ && context_.keys.empty())
      context_.log.write(Level::kWarn, "open_to_network",
                         {{"reason", "anyone who reaches this address can use the policy; see --api-keys"}});
    if (!loopback_ && !context_.keys.empty() && !tls_)
      context_.log.write(Level::kWarn, "keys_in_clear",
                         {{"reason", "API keys travel unencrypted; see --cert and --key"}});
  }

  void accept() {
    acceptor_.async_accept(net::make_strand(io_), [this](error_code error, tcp::socket socket) {
      if (context_.draining || error == net::error::operation_aborted) return;
      if (error) {  // out of file descriptors, usually: some will come back
        context_.log.write(Level::kWarn, "accept", {{"reason", error.message()}});
        auto pause = std::make_shared<net::steady_timer>(io_, std::chrono::milliseconds(100));
        return pause->async_wait([this, pause](error_code) { accept(); });
      }
      if (registry_.count() < static_cast<std::size_t>(options_.max_connections) + kSpareConnections) {
        error_code ignored;
        socket.set_option(tcp::no_delay(true), ignored);
        if (tls_) {
          start_tls_connection(std::move(socket), *tls_, context_, registry_);
        } else {
          start_plain_connection(std::move(socket), context_, registry_);
        }
      } else {
        context_.metrics.fail(Cause::kConnections);
      }
      accept();
    });
  }

  void watch_signals() {
    keep_signals();
    for (const int signal : {SIGTERM, SIGINT, SIGHUP}) signals_.add(signal);
    wait_for_signal();
  }
  void wait_for_signal() {
    signals_.async_wait([this](error_code error, int signal) {
      if (error) return;
      signal == SIGHUP ? reload() : drain();
      wait_for_signal();
    });
  }

  void reload() {
    if (context_.draining) return;
    if (reloading_.exchange(true)) {
      context_.log.write(Level::kWarn, "reload",
                         {{"reason", "one is under way already; send SIGHUP again when it is done"}});
      return;
    }
    if (reloader_.joinable()) reloader_.join();
    reloader_ = std::thread([this] {
      const auto host = open_host(context_.metrics.generation + 1);
      if (host.ok()) {
        context_.set_host(*host);
        ++context_.metrics.reloads;
        context_.log.write(Level::kInfo, "reloaded",
                           {{"checkpoint", (*host)->info().checkpoint},
                            {"contract_hash", (*host)->contract_hash()},
                            {"generation", (*host)->generation()}});
      } else {
        ++context_.metrics.failed_reloads;
        context_.log.write(Level::kError, "reload_failed", {{"reason", host.status().message()}});
      }
      reloading_ = false;
    });
  }

  void drain() {
    if (context_.draining.exchange(true)) return;
    context_.log.write(Level::kInfo, "draining",
                       {{"connections", context_.robots.load()}, {"pending", context_.scheduler.pending()}});
    error_code ignored;
    acceptor_.close(ignored);
    registry_.drain_all();
    drain_until_ = Clock::now() + std::chrono::duration_cast<Clock::duration>(
                                      std::chrono::duration<double>(options_.drain_seconds));
    check_drained();
  }
  void check_drained() {
    constexpr auto kGoodbye = std::chrono::milliseconds(500);  // for close frames
    const bool done = context_.scheduler.pending() == 0 && context_.robots == 0;
    const Clock::time_point now = Clock::now();
    if (done || now >= drain_until_ + kGoodbye) return io_.stop();
    if (now >= drain_until_ && !std::exchange(cut_off_, true)) context_.scheduler.fail_waiting();
    drain_timer_.expires_after(std::chrono::milliseconds(10));
    drain_timer_.async_wait([this](error_code) { check_drained(); });
  }

  const ServeOptions options_;
  Context context_;
  std::optional<net::ssl::context> tls_;
  Registry registry_;
  net::io_context io_;  // its handlers own the connections: it ends before what they refer to
  tcp::acceptor acceptor_;
  net::signal_set signals_;
  net::steady_timer drain_timer_;
  std::string address_;
  bool loopback_ = true, cut_off_ = false;
  Clock::time_point drain_until_;
  std::thread reloader_;
  std::atomic<bool> reloading_ = false;
};

}  // namespace

Status serve(const ServeOptions& options, const std::function<void(const std::string&)>& ready) {
  if (Status status = check(options); !status.ok()) return status;
  Result<KeyRing> keys = KeyRing::load(options.api_keys);
  if (!keys.ok()) return keys.status();
  return Server(options, *std::move(keys)).run(ready);
}

}  // namespace servoflow::serve
