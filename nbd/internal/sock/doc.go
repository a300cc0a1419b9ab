// Package sock does with the socket of a connection what [net.Conn] cannot: it tells
// whether the peer has sent bytes that have not been read ([Unread]), and how many bytes
// the peer has acknowledged and sent ([Meter]), and it combines the small writes of TLS
// into large ones ([Batch]).
//
// It does not know the NBD protocol, requests or devices. For connections that are not
// sockets, such as [net.Pipe], and on systems other than Linux, it has less information:
// each function says what it does then.
package sock
