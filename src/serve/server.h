// The openpi-compatible websocket server: robots connect, send observations and get action chunks.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "servoflow/policy.h"
#include "servoflow/status.h"

namespace servoflow::serve {

struct ServeOptions {
  std::string checkpoint;
  PolicyOptions policy;       // device, precision, …; robot and max_batch are those below
  std::string robot;          // built-in name or contract file; empty: the checkpoint's own
  std::uint64_t seed = 0;     // every connection's noise begins with it
  std::string version;        // told to clients
  std::string metadata_json;  // a JSON object that joins the metadata sent on connect; empty: none

  std::string host = "127.0.0.1";
  int port = 8000;  // 0: any free one
  int io_threads = 2;
  std::string cert, key;  // PEM files: TLS; both or none
  std::string api_keys;   // file of keys, see KeyRing
  std::string log_level = "info";

  int max_connections = 64;
  int max_batch = 0;        // per device; 0: what pays off there, see PolicyOptions
  double max_wait_ms = 2;   // for others to join a batch
  int queue = 128;          // requests waiting, of all connections
  int max_outstanding = 8;  // unanswered requests of one connection
  std::size_t max_message_bytes = std::size_t{64} << 20;
  double max_rate = 1000;  // requests a second of one connection; 0: any
  double handshake_seconds = 10;
  double idle_seconds = 60;   // a client that does not even answer pings for that long is gone
  double write_seconds = 20;  // to take one reply
  double drain_seconds = 4;   // to finish what is in flight on SIGTERM

  std::string record;                  // folder for case files; empty: none
  std::uint64_t record_limit = 10000;  // case files
};

// Opens the checkpoint, listens, and runs until SIGTERM or SIGINT; SIGHUP opens the checkpoint again and
// swaps it in. `ready` is called once with the address that is listened on, "ws://127.0.0.1:8000". Returns OK
// after a clean end.
Status serve(const ServeOptions& options, const std::function<void(const std::string&)>& ready);

}  // namespace servoflow::serve
