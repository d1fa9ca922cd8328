#include "serve/connection_stream.h"

namespace servoflow::serve {

std::string peer_name(const net::ip::tcp::socket& socket) {
  beast::error_code error;
  const auto endpoint = socket.remote_endpoint(error);
  return error ? "unknown" : endpoint.address().to_string() + ":" + std::to_string(endpoint.port());
}

void Registry::add(std::weak_ptr<Drainable> connection) {
  const std::lock_guard guard(mutex_);
  std::erase_if(connections_, [](const auto& one) { return one.expired(); });
  connections_.push_back(std::move(connection));
}

void Registry::drain_all() {
  const std::lock_guard guard(mutex_);
  for (const auto& one : connections_)
    if (const auto connection = one.lock()) connection->begin_drain();
}

std::size_t Registry::count() {
  const std::lock_guard guard(mutex_);
  std::erase_if(connections_, [](const auto& one) { return one.expired(); });
  return connections_.size();
}

void start_plain_connection(net::ip::tcp::socket socket, Context& context, Registry& registry) {
  std::string peer = peer_name(socket);
  auto connection =
      std::make_shared<Connection<beast::tcp_stream>>(context, std::move(peer), std::move(socket));
  registry.add(connection);
  net::dispatch(connection->lowest().get_executor(), [connection] { connection->read_http(); });
}

}  // namespace servoflow::serve
