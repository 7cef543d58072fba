"""Says to be a controller, and is none: ADDRESS CERTIFICATE KEY HINT WAYS.

Answers MarcoPolo and mDNS at once, with the CA's hint that it was told, and shows a certificate of its own on the usual
ports. Every connection is printed."""

import socket
import ssl
import struct
import sys
import threading

address, certificate, key, hint, ways = sys.argv[1:]


def join(group, port):
    listener = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("", port))
    membership = socket.inet_aton(group) + socket.inet_aton(address)
    listener.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, membership)
    listener.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(address))
    return listener


def marcopolo():
    listener = join("224.0.0.112", 1337)
    while True:
        _, asker = listener.recvfrom(4096)
        listener.sendto(b'{"Command": "OK", "Params": {}}', asker)


def name(text):
    return b"".join(bytes([len(part)]) + part.encode() for part in text.split(".")) + b"\0"


def record(owner, kind, data, unique=True):
    return name(owner) + struct.pack(">HHIH", kind, 0x8001 if unique else 1, 120, len(data)) + data


def mdns():
    service, instance, host = "_marco-bootstrap._tcp.local", "trap._marco-bootstrap._tcp.local", "trap.local"
    texts = [b"v=1", b"enroll=1347", b"ca=" + hint.encode()]
    answer = struct.pack(">HHHHHH", 0, 0x8400, 0, 4, 0, 0)
    answer += record(service, 12, name(instance), unique=False)
    answer += record(instance, 33, struct.pack(">HHH", 0, 0, 1346) + name(host))
    answer += record(instance, 16, b"".join(bytes([len(text)]) + text for text in texts))
    answer += record(host, 1, socket.inet_aton(address))
    listener = join("224.0.0.251", 5353)
    while True:
        question, _ = listener.recvfrom(9000)
        # A question is no answer, and ours is heard here, too.
        if question[2] & 0x80 == 0 and b"_marco-bootstrap" in question:
            listener.sendto(answer, ("224.0.0.251", 5353))


def controller(port):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    context.set_alpn_protocols(["h2"])
    listener = socket.create_server((address, port))
    while True:
        connection, (peer, _) = listener.accept()
        print("connection from", peer, "to", port, flush=True)
        try:
            with context.wrap_socket(connection, server_side=True) as stream:
                print("handshake done", flush=True)
                stream.recv(4096)
        except OSError:
            pass


parts = [lambda: controller(1346), lambda: controller(1347)]
parts += [marcopolo] if "marcopolo" in ways else []
parts += [mdns] if "mdns" in ways else []
for part in parts:
    threading.Thread(target=part, daemon=True).start()
print("ready", flush=True)
threading.Event().wait()
