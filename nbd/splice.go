package nbd

import "xapi-nbd/nbd/internal/zerocopy"

// spliceMin is the shortest read, in bytes, whose data is spliced from a file to the socket.
// For shorter reads, splicing makes clients on the same machine slow: they copy from the
// beginning of a page to memory of malloc(3), which begins 16 bytes after that of a page
// (see payloadPlace).
const spliceMin = 128 << 10

// newSender returns nil if data cannot be spliced to the connection: with TLS the data has
// to be encrypted, and not every connection is a socket.
func newSender(c *conn, can capabilities) *zerocopy.Sender {
	if can.file == nil || c.peer.TLS != nil {
		return nil
	}
	return zerocopy.NewSender(c.raw)
}
