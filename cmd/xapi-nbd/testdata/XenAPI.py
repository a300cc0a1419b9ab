"""The part of the module XenAPI that docs/examples use, for the simulated host: its socket
is $XAPI_SOCKET, and the service listens on $ADDRESS and $PORT."""

import http.client
import os
import socket
import xmlrpc.client


class _Connection(http.client.HTTPConnection):
    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(os.environ["XAPI_SOCKET"])


class _Transport(xmlrpc.client.Transport):
    def make_connection(self, host):
        return _Connection("localhost")


class Failure(Exception):
    pass


class _Method:
    def __init__(self, server, name):
        self.server, self.name = server, name

    def __getattr__(self, name):
        return _Method(self.server, self.name + "." + name)

    def __call__(self, *args):
        reply = getattr(self.server, self.name)(os.environ["SESSION"], *args)
        if reply["Status"] != "Success":
            raise Failure(reply["ErrorDescription"])
        value = reply["Value"]
        if self.name == "VDI.get_nbd_info":
            for info in value:
                info["address"], info["port"] = os.environ["ADDRESS"], os.environ["PORT"]
        return value


class _Calls:
    def __init__(self, server):
        self.server = server

    def login_with_password(self, *args):
        """The session exists already."""

    def __getattr__(self, name):
        return _Method(self.server, name)


class Session:
    def __init__(self, url):
        self.xenapi = _Calls(xmlrpc.client.ServerProxy("http://localhost/", _Transport()))
