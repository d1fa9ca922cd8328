// Accepted sockets: HTTP first, then a websocket with one robot.
#pragma once

#include <boost/asio/ip/tcp.hpp>
#include <memory>
#include <mutex>
#include <set>

#include "serve/context.h"

namespace boost::asio::ssl {
class context;
}

namespace servoflow::serve {

class Drainable {
 public:
  virtual ~Drainable() = default;
  virtual void begin_drain() = 0;  // from any thread
};

// All open connections, so that they can be drained.
class Registry {
 public:
  void add(std::weak_ptr<Drainable> connection);
  void drain_all();
  std::size_t count();  // of those that still live

 private:
  std::mutex mutex_;
  std::vector<std::weak_ptr<Drainable>> connections_;
};

void start_plain_connection(boost::asio::ip::tcp::socket socket, Context& context, Registry& registry);
void start_tls_connection(boost::asio::ip::tcp::socket socket, boost::asio::ssl::context& tls,
                          Context& context, Registry& registry);

}  // namespace servoflow::serve
