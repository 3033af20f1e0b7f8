#!/usr/bin/env python3
"""qmp.py SOCK COMMAND... - sends QMP commands and prints the answers on one line, events as EVENT.

A command is a JSON object, or a name with its arguments as JSON: 'device_del {"id":"d0"}'.
"""
import json
import socket
import sys


def line(stream):
    """The next message that is no event; events are printed."""
    while True:
        text = stream.readline()
        if not text:
            sys.exit("qmp: the other side has gone")
        message = json.loads(text)
        if "event" not in message:
            return message
        print("EVENT", message["event"], json.dumps(message.get("data", {})), end="; ")


def command(text):
    if text.startswith("{"):
        return text
    name, _, arguments = text.partition(" ")
    c = {"execute": name}
    if arguments:
        c["arguments"] = json.loads(arguments)
    return json.dumps(c)


def main():
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(20)
    sock.connect(sys.argv[1])
    stream = sock.makefile("rw")

    def send(text):
        stream.write(text + "\n")
        stream.flush()
        return line(stream)

    stream.readline()  # the greeting
    send(command("qmp_capabilities"))
    failed = False
    for text in sys.argv[2:]:
        answer = send(command(text))
        failed |= "error" in answer
        print(json.dumps(answer.get("return", answer.get("error"))), end="; ")
    sock.settimeout(0.3)  # what still happens because of it
    try:
        line(stream)
    except (OSError, SystemExit):
        pass
    print()
    sys.exit(failed)


main()
