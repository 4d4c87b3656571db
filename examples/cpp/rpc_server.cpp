// SPDX-FileCopyrightText: The qcompiler authors
// SPDX-License-Identifier: Apache-2.0

// Lends this machine to a tuner, over TVM's RPC, without Python:
//
//   rpc_server --tracker HOST:PORT --key KEY [--port 9090] [--host ADDRESS]
//
// It registers with the tracker and serves one client at a time, each in a process and a folder of
// its own that go with it, so a kernel that crashes takes only its session along.  ADDRESS is how
// clients reach this machine, where the tracker sees another one (behind NAT).
//
// It runs whatever code a client sends: only in a network that you trust.
#include <netdb.h>
#include <poll.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>

#include <csignal>
#include <ctime>
#include <filesystem>
#include <iostream>
#include <random>

#include "qcm.h"

namespace {

// Source: TVM, python/tvm/rpc/base.py and server.py.
constexpr int32_t kMagic = 0xFF271, kTrackerMagic = 0x2F271;
constexpr int32_t kSuccess = kMagic, kMismatch = kMagic + 2;
constexpr int kPut = 3, kUpdateInfo = 5, kPendingKeys = 7;
constexpr int kPorts = 100, kPingMs = 2000, kMissedPings = 3;

/*! The other end went away or says something else than the protocol. */
struct Disconnected : std::runtime_error {
  using std::runtime_error::runtime_error;
};

class Socket {
 public:
  explicit Socket(int fd) : fd_(fd) {}
  Socket(Socket&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  Socket(const Socket&) = delete;
  ~Socket() {
    if (fd_ >= 0) close(fd_);
  }
  int fd() const { return fd_; }

  void Send(const void* data, size_t size) const {
    for (const char* at = static_cast<const char*>(data); size > 0;) {
      ssize_t done = send(fd_, at, size, MSG_NOSIGNAL);
      if (done <= 0) throw Disconnected("cannot send");
      at += done;
      size -= static_cast<size_t>(done);
    }
  }
  void Send(int32_t value) const { Send(&value, sizeof value); }
  void SendText(const std::string& text) const {
    Send(static_cast<int32_t>(text.size()));
    Send(text.data(), text.size());
  }
  void Receive(void* data, size_t size) const {
    for (char* at = static_cast<char*>(data); size > 0;) {
      ssize_t done = recv(fd_, at, size, 0);
      if (done <= 0) throw Disconnected("connection closed");
      at += done;
      size -= static_cast<size_t>(done);
    }
  }
  int32_t ReceiveInt() const {
    int32_t value = 0;
    Receive(&value, sizeof value);
    return value;
  }
  std::string ReceiveText() const {
    int32_t size = ReceiveInt();
    if (size < 0 || size > 1 << 20) throw Disconnected("a message of a strange size");
    std::string text(static_cast<size_t>(size), '\0');
    Receive(text.data(), text.size());
    return text;
  }

 private:
  int fd_;
};

struct Options {
  std::string tracker_host, tracker_port, key, host;
  int port = 9090;
};

Socket Connected(const std::string& host, const std::string& port) {
  addrinfo hints{}, *found = nullptr;
  hints.ai_socktype = SOCK_STREAM;
  if (getaddrinfo(host.c_str(), port.c_str(), &hints, &found) != 0) {
    throw Disconnected("no address of " + host);
  }
  int fd = -1;
  for (addrinfo* at = found; at != nullptr && fd < 0; at = at->ai_next) {
    fd = socket(at->ai_family, at->ai_socktype | SOCK_CLOEXEC, at->ai_protocol);
    if (fd >= 0 && connect(fd, at->ai_addr, at->ai_addrlen) != 0) {
      close(fd);
      fd = -1;
    }
  }
  freeaddrinfo(found);
  if (fd < 0) throw Disconnected("no answer from " + host + ":" + port);
  return Socket(fd);
}

/*! Listens on the first free port from `port` on, which it updates. */
Socket Listening(int& port) {
  for (int last = port + kPorts; port < last; ++port) {
    Socket made(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
    int yes = 1;
    setsockopt(made.fd(), SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_port = htons(static_cast<uint16_t>(port));
    auto* at = reinterpret_cast<sockaddr*>(&address);
    if (bind(made.fd(), at, sizeof address) == 0 && listen(made.fd(), 8) == 0) return made;
  }
  throw std::runtime_error("no free port below " + std::to_string(port));
}

using qcm::Function;
using qcm::Module;
using qcm::String;

std::string Quoted(const std::string& text) {
  return tvm::ffi::json::Stringify(String(text)).operator std::string();
}

class Server {
 public:
  explicit Server(Options options)
      : options_(std::move(options)), listening_(Listening(options_.port)) {}

  [[noreturn]] void Run() {
    while (true) {
      try {
        Register();
      } catch (const Disconnected& error) {
        std::cerr << "rpc_server: tracker: " << error.what() << ", trying again\n";
        sleep(1);
      }
    }
  }

 private:
  std::string Host() const { return options_.host.empty() ? "null" : Quoted(options_.host); }

  /*! Serves until the tracker is gone. */
  void Register() {
    Socket tracker = Connected(options_.tracker_host, options_.tracker_port);
    tracker.Send(kTrackerMagic);
    if (tracker.ReceiveInt() != kTrackerMagic) throw Disconnected("that is no tracker");
    std::string port = std::to_string(options_.port);
    Ask(tracker, "[" + std::to_string(kUpdateInfo) + ", {\"key\": " +
                     Quoted("server:" + options_.key) + ", \"addr\": [" + Host() + ", " + port +
                     "]}]");
    std::cout << "rpc_server: port " << port << ", key " << options_.key << std::endl;
    while (true) Serve(tracker);
  }

  static void Ask(const Socket& tracker, const std::string& request) {
    tracker.SendText(request);
    if (tracker.ReceiveText() != "0") throw Disconnected("the tracker refuses " + request);
  }

  /*! Offers this machine under a new name, which only the client that it is lent to will know. */
  void Offer(const Socket& tracker) {
    name_ = options_.key + ":" + std::to_string(random_()) + std::to_string(random_());
    Ask(tracker, "[" + std::to_string(kPut) + ", " + Quoted(options_.key) + ", [" +
                     std::to_string(options_.port) + ", " + Quoted(name_) + "], " + Host() + "]");
  }

  /*! Waits for one client and serves it. */
  void Serve(const Socket& tracker) {
    Offer(tracker);
    for (int missed = 0;;) {
      pollfd waiting{listening_.fd(), POLLIN, 0};
      if (poll(&waiting, 1, kPingMs) > 0) {
        Socket client(accept4(listening_.fd(), nullptr, nullptr, SOCK_CLOEXEC));
        if (client.fd() < 0) continue;
        try {
          std::string key;
          if (!Greeted(client, key)) continue;
          InProcess(client, key);
        } catch (const Disconnected&) {
          continue;  // the client's affair
        }
        return;
      }
      tracker.SendText("[" + std::to_string(kPendingKeys) + "]");
      bool pending = tracker.ReceiveText().find(Quoted(name_)) != std::string::npos;
      missed = pending ? 0 : missed + 1;
      if (missed > kMissedPings) {  // lent, but the client never came
        Offer(tracker);
        missed = 0;
      }
    }
  }

  bool Greeted(const Socket& client, std::string& key) const {
    if (client.ReceiveInt() != kMagic) return false;
    key = client.ReceiveText();
    if (key.substr(0, key.find(' ')) != "client:" + name_) {
      client.Send(kMismatch);
      return false;
    }
    client.Send(kSuccess);
    client.SendText("server:" + options_.key);
    return true;
  }

  /*! Serves a client in a child process, and waits for its end. */
  void InProcess(const Socket& client, const std::string& key) const {
    std::string folder = (std::filesystem::temp_directory_path() / "rpc-XXXXXX").string();
    if (mkdtemp(folder.data()) == nullptr) throw std::runtime_error("cannot make " + folder);
    pid_t child = fork();
    if (child == 0) {
      prctl(PR_SET_PDEATHSIG, SIGKILL);
      size_t limit = key.find("-timeout=");
      if (limit != std::string::npos) {
        alarm(static_cast<unsigned>(std::stod(key.substr(limit + 9))) + 1);
      }
      int status = 1;
      try {
        Session(client.fd(), folder);
        status = 0;
      } catch (const std::exception& error) {
        std::cerr << "rpc_server: " << error.what() << "\n";
      }
      std::_Exit(status);
    }
    if (child > 0) waitpid(child, nullptr, 0);
    std::filesystem::remove_all(folder);
    if (child < 0) throw std::runtime_error("cannot fork");
  }

  static void Session(int fd, const std::string& folder) {
    auto path_of = [folder](String name) {
      // A client names files of its session; whatever folder it names them in, they lie here.
      return (std::filesystem::path(folder) /
              std::filesystem::path(std::string(name)).filename())
          .string();
    };
    auto path = [path_of](String name) { return String(path_of(name)); };
    auto load = [path_of](String name) { return Module::LoadFromFile(String(path_of(name))); };
    Function::SetGlobal("tvm.rpc.server.workpath", Function::FromTyped(path), true);
    Function::SetGlobal("tvm.rpc.server.load_module", Function::FromTyped(load), true);
    Function::GetGlobalRequired("rpc.ServerLoop")(fd);
  }

  Options options_;
  Socket listening_;
  std::string name_;
  std::random_device random_;
};

int Usage() {
  std::cerr << "usage: rpc_server --tracker HOST:PORT --key KEY [--port 9090] [--host ADDRESS]\n";
  return 2;
}

int Main(const std::vector<std::string>& arguments) {
  Options options;
  if (arguments.size() % 2 != 0) return Usage();
  for (size_t i = 0; i < arguments.size(); i += 2) {
    const std::string &name = arguments[i], &value = arguments[i + 1];
    size_t colon = value.rfind(':');
    if (name == "--tracker" && colon != std::string::npos) {
      options.tracker_host = value.substr(0, colon);
      options.tracker_port = value.substr(colon + 1);
    } else if (name == "--key") {
      options.key = value;
    } else if (name == "--port") {
      options.port = std::stoi(value);
    } else if (name == "--host") {
      options.host = value;
    } else {
      return Usage();
    }
  }
  if (options.tracker_port.empty() || options.key.empty()) return Usage();
  Server(options).Run();
}

}  // namespace

int main(int count, char** arguments) {
  try {
    return Main(std::vector<std::string>(arguments + 1, arguments + count));
  } catch (const std::exception& error) {
    std::cerr << "rpc_server: " << error.what() << "\n";
    return 1;
  }
}
