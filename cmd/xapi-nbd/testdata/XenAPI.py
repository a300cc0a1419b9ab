"""The part of the module XenAPI that docs/examples use, for simulated hosts. $XAPI_HOSTS is
a JSON object that has for each URL: "socket", the path of xapi's socket; "address" and "port"
of the service; "sessions", the path of a file with a session in each line, of which a login
takes the first; "certificate", the path of the service's certificate, or ""."""

import http.client
import json
import os
import socket
import xmlrpc.client


class _Connection(http.client.HTTPConnection):
    def __init__(self, path):
        super().__init__("localhost")
        self.path = path

    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(self.path)


class _Transport(xmlrpc.client.Transport):
    def __init__(self, path):
        super().__init__()
        self.path = path

    def make_connection(self, host):
        return _Connection(self.path)


class Failure(Exception):
    def __init__(self, details):
        super().__init__(details)
        self.details = details


class _Method:
    def __init__(self, calls, name):
        self.calls, self.name = calls, name

    def __getattr__(self, name):
        return _Method(self.calls, self.name + "." + name)

    def __call__(self, *args):
        reply = getattr(self.calls.server, self.name)(self.calls.session_ref, *args)
        if reply["Status"] != "Success":
            raise Failure(reply["ErrorDescription"])
        value = reply["Value"]
        if self.name == "VDI.get_nbd_info":
            host = self.calls.host
            for info in value:
                info["address"], info["port"] = host["address"], host["port"]
                if host["certificate"]:
                    with open(host["certificate"]) as f:
                        info["cert"] = f.read()
        return value


class _Calls:
    def __init__(self, host):
        self.host, self.session_ref = host, ""
        self.server = xmlrpc.client.ServerProxy("http://localhost/", _Transport(host["socket"]))

    def login_with_password(self, *args):
        path = self.host["sessions"]
        with open(path) as f:
            self.session_ref, *others = f.read().split()
        with open(path, "w") as f:
            f.write("\n".join(others))

    def __getattr__(self, name):
        return _Method(self, name)


class Session:
    def __init__(self, url):
        self.xenapi = _Calls(json.loads(os.environ["XAPI_HOSTS"])[url])
