// Package sock has functions for the socket of a connection that [net.Conn] lacks. [Unread]
// reports whether the peer has sent bytes that have not been read, [Meter] counts the bytes
// that the peer has acknowledged and sent, and [Batch] combines the small writes of TLS
// into large ones.
//
// It does not know the NBD protocol, requests or devices. For connections that are not
// sockets, such as [net.Pipe], and on systems other than Linux, it has less information,
// as described with each function.
package sock
