#!/usr/bin/env python3
"""vuproxy.py LISTEN BACKEND - stands between a vhost-user front-end and a back-end, passes the
messages on with their file descriptors, and prints them."""
import array
import os
import socket
import struct
import sys
import threading

NAMES = {
    1: "GET_FEATURES", 2: "SET_FEATURES", 3: "SET_OWNER", 4: "RESET_OWNER", 5: "SET_MEM_TABLE",
    6: "SET_LOG_BASE", 7: "SET_LOG_FD", 8: "SET_VRING_NUM", 9: "SET_VRING_ADDR", 10: "SET_VRING_BASE",
    11: "GET_VRING_BASE", 12: "SET_VRING_KICK", 13: "SET_VRING_CALL", 14: "SET_VRING_ERR",
    15: "GET_PROTOCOL_FEATURES", 16: "SET_PROTOCOL_FEATURES", 17: "GET_QUEUE_NUM",
    18: "SET_VRING_ENABLE", 21: "SET_BACKEND_REQ_FD", 24: "GET_CONFIG", 25: "SET_CONFIG",
    31: "GET_INFLIGHT_FD", 32: "SET_INFLIGHT_FD", 34: "RESET_DEVICE", 35: "VRING_KICK",
    36: "GET_MAX_MEM_SLOTS", 37: "ADD_MEM_REG", 38: "REM_MEM_REG", 39: "SET_STATUS", 40: "GET_STATUS",
    41: "GET_SHARED_OBJECT", 42: "SET_DEVICE_STATE_FD", 43: "CHECK_DEVICE_STATE",
}  # fmt: skip
PROTOCOL = [
    "MQ", "LOG_SHMFD", "RARP", "REPLY_ACK", "MTU", "BACKEND_REQ", "CROSS_ENDIAN", "CRYPTO", "PAGEFAULT",
    "CONFIG", "BACKEND_SEND_FD", "HOST_NOTIFIER", "INFLIGHT_SHMFD", "RESET_DEVICE", "INBAND_NOTIF",
    "CONFIGURE_MEM_SLOTS", "STATUS", "XEN_MMAP", "SHARED_OBJECT", "DEVICE_STATE",
    "GET_VRING_BASE_INFLIGHT", "SHMEM",
]  # fmt: skip
HEADER = struct.Struct("<III")


def receive(sock):
    """One message and its descriptors; None at the end."""
    data, fds, want = b"", [], HEADER.size
    while len(data) < want:
        part, ancillary, _, _ = sock.recvmsg(want - len(data), socket.CMSG_SPACE(64 * 4))
        if not part:
            return None
        for _, _, content in ancillary:
            fds += array.array("i", content[: len(content) // 4 * 4])
        data += part
        if len(data) == HEADER.size:
            want = HEADER.size + HEADER.unpack(data)[2]
    return data, fds


def features(request, value):
    bits = [i for i in range(64) if value >> i & 1]
    if request > 14:
        return f"{value:#x} " + "|".join(PROTOCOL[i] if i < len(PROTOCOL) else str(i) for i in bits)
    return f"{value:#x} bits " + ",".join(map(str, bits))


def regions(payload):
    (count,) = struct.unpack_from("<I", payload)
    text = f"regions={count}"
    for i in range(count):
        gpa, size, _, offset = struct.unpack_from("<QQQQ", payload, 8 + 32 * i)
        text += f" [gpa={gpa:x} size={size:x} off={offset:x}]"
    return text


def describe(request, payload):
    n = len(payload)
    if request in (1, 2, 15, 16) and n == 8:
        return features(request, struct.unpack("<Q", payload)[0])
    if request in (24, 25) and n >= 12:
        return "off=%d size=%d flags=%d " % struct.unpack_from("<III", payload) + payload[12:28].hex()
    if request == 5:
        return regions(payload)
    if request in (8, 10, 11, 18) and n == 8:
        return "%d %d" % struct.unpack("<II", payload)
    return hex(struct.unpack("<Q", payload)[0]) if n == 8 else ""


def pump(source, target, arrow):
    while (message := receive(source)) is not None:
        data, fds = message
        request, flags, size = HEADER.unpack(data[:12])
        marks = (" NEED_REPLY" if flags & 8 else "") + (" (reply)" if flags & 4 else "")
        text = describe(request, data[12:])
        name = NAMES.get(request, request)
        print(f"{arrow} {name}{marks} len={size} fds={len(fds)} {text}", flush=True)
        if fds:
            socket.send_fds(target, [data], fds)
        else:
            target.sendall(data)
        for fd in fds:
            os.close(fd)
    target.close()


def main():
    listen, backend = sys.argv[1:3]
    if os.path.exists(listen):
        os.unlink(listen)
    server = socket.socket(socket.AF_UNIX)
    server.bind(listen)
    server.listen(1)
    front, _ = server.accept()
    back = socket.socket(socket.AF_UNIX)
    back.connect(backend)
    threading.Thread(target=pump, args=(back, front, "<-"), daemon=True).start()
    pump(front, back, "->")


main()
