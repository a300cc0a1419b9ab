package nbd

import (
	"errors"
	"net"
	"time"

	"xapi-nbd/nbd/internal/neterr"
	"xapi-nbd/nbd/internal/zerocopy"
)

// transferTime returns how long a peer may take for n bytes, see Limits.WriteTimeout.
func (c *conn) transferTime(n int64) time.Duration {
	const slowestRate = 256 << 10 // bytes per second
	return c.srv.limits.Load().WriteTimeout + time.Duration(n/slowestRate)*time.Second
}

// tlsRecord is the most data that one record of TLS holds, in bytes.
const tlsRecord = 16 << 10

// write sends all of b.
func (c *conn) write(b []byte) error {
	return c.sending(int64(len(b)), func() error {
		if c.batch == nil || len(b) <= tlsRecord {
			_, err := c.nc.Write(b)
			return err
		}
		c.batch.Begin()
		_, err := c.nc.Write(b)
		return errors.Join(err, c.batch.End())
	})
}

// writePieces sends all pieces of one message. It empties pieces.
func (c *conn) writePieces(pieces *net.Buffers) error {
	n := 0
	for _, p := range *pieces {
		n += len(p)
	}
	return c.sending(int64(n), func() error {
		if c.batch == nil {
			_, err := pieces.WriteTo(c.nc) // writev(2)
			return err
		}
		c.batch.Begin()
		_, err := pieces.WriteTo(c.nc)
		return errors.Join(err, c.batch.End())
	})
}

// writeSpliced sends a header and the data in pipes.
func (c *conn) writeSpliced(s *zerocopy.Sender, header []byte, data *zerocopy.Pipes) error {
	return c.sending(int64(data.Len()), func() error { return s.Send(header, data) })
}

// sending calls send, which sends n bytes, with a deadline.
func (c *conn) sending(n int64, send func() error) error {
	if err := c.setWriteDeadline(time.Now().Add(c.transferTime(n))); err != nil {
		return err
	}
	if err := send(); err != nil {
		if neterr.IsTimeout(err) {
			return hardDisconnect("the peer does not read its replies", err)
		}
		return err
	}
	// TLS may write while it reads, long after this. An error here does not mean that
	// the reply was not sent.
	_ = c.setWriteDeadline(time.Time{})
	return nil
}

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
