#include <boost/asio/ssl.hpp>
#include <boost/beast/ssl.hpp>
#include <boost/beast/websocket/ssl.hpp>

#include "serve/connection_stream.h"

namespace servoflow::serve {

void start_tls_connection(net::ip::tcp::socket socket, net::ssl::context& tls, Context& context,
                          Registry& registry) {
  using Stream = beast::ssl_stream<beast::tcp_stream>;
  std::string peer = peer_name(socket);
  auto connection = std::make_shared<Connection<Stream>>(context, std::move(peer), std::move(socket), tls);
  registry.add(connection);
  net::dispatch(connection->lowest().get_executor(), [connection, &context] {
    connection->lowest().expires_after(Connection<Stream>::seconds(context.options.handshake_seconds));
    connection->stream().async_handshake(
        net::ssl::stream_base::server, [connection, &context](beast::error_code error) {
          if (!error) return connection->read_http();
          context.metrics.fail(Cause::kProtocol);
          context.log.write(
              EventLog::Level::kWarn, "refused",
              {{"cause", cause_name(Cause::kProtocol)}, {"reason", "TLS handshake: " + error.message()}});
        });
  });
}

}  // namespace servoflow::serve
