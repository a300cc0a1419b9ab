// Package control is the protocol between nbd-tool ctl and a running nbd-tool mirror.
//
// A client connects to a unix socket and sends requests, each a JSON object on a line of at
// most 4 KiB. The server answers each with a JSON object on a line, in order. A request
// whose answer takes long, such as "wait", is withdrawn by closing the connection, except that
// "complete" goes on. Unknown fields of a request are refused, so that a client learns that a
// server does not support them. Clients ignore unknown fields of a reply.
//
// The socket has mode 0600, and the server answers only root and its own user.
package control
