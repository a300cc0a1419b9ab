package nbd

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"xapi-nbd/nbd/wire"
)

// Conn is the client's end of a connection in the transmission phase. ReadAt
// may be called concurrently: all requests share the connection, and each gets
// its own answer by its cookie. Close ends it.
type Conn struct {
	info wire.ExportInfo
	nc   net.Conn
	in   *bufio.Reader
	done chan struct{} // closed when the receiver has ended

	sending sync.Mutex // guards the order of bytes on the wire

	mu      sync.Mutex // guards what follows
	last    uint64     // the newest cookie
	waiting map[uint64]*call
	err     error // why the connection has ended
}

// call is one request that waits for its answer.
type call struct {
	p    []byte
	done chan error // receives once
}

func newConnOf(nc net.Conn, in *bufio.Reader, info wire.ExportInfo) *Conn {
	c := &Conn{info: info, nc: nc, in: in, done: make(chan struct{}), waiting: make(map[uint64]*call)}
	go c.receive() // ends with the connection; Close waits for it
	return c
}

// Size is the export's size in bytes.
func (c *Conn) Size() int64 { return int64(c.info.Size) }

// Info is what the server said of the export.
func (c *Conn) Info() wire.ExportInfo { return c.info }

// ReadAt implements [io.ReaderAt]. A failed command is an [*Error] with its
// errno; the connection goes on. Reads that the server's size constraints do not
// allow are split, or widened to whole blocks.
func (c *Conn) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, errors.New("negative offset")
	}
	want := len(p)
	if rest := c.Size() - off; int64(want) > rest {
		p = p[:max(rest, 0)]
	}
	unit, limit := c.constraints()
	n := 0
	for n < len(p) {
		at := off + int64(n)
		begin := at / unit * unit
		end := min((off+int64(len(p))+unit-1)/unit*unit, begin+limit, c.Size())
		got, err := c.readBlocks(p[n:], at, begin, end)
		n += got
		if err != nil {
			return n, err
		}
	}
	if n < want {
		return n, io.EOF
	}
	return n, nil
}

// constraints are the unit of requests and the length of the longest, a
// multiple of it. What a server says is made sane, not believed.
func (c *Conn) constraints() (unit, limit int64) {
	unit = int64(max(c.info.BlockSizes.Min, 1))
	if unit > wire.MaxMinBlock || unit&(unit-1) != 0 {
		unit = 1
	}
	limit = wire.DefaultMaxPayload
	if m := int64(c.info.BlockSizes.MaxPayload); m >= unit {
		limit = min(limit, m)
	}
	return unit, limit / unit * unit
}

// readBlocks requests [begin, end) and gives p what it wants of that, from at
// on. Where the two are the same nothing is copied.
func (c *Conn) readBlocks(p []byte, at, begin, end int64) (int, error) {
	n := int(min(int64(len(p)), end-at))
	if begin == at && end-begin == int64(n) {
		if err := c.read(p[:n], uint64(begin)); err != nil {
			return 0, err
		}
		return n, nil
	}
	blocks := make([]byte, end-begin)
	if err := c.read(blocks, uint64(begin)); err != nil {
		return 0, err
	}
	return copy(p[:n], blocks[at-begin:]), nil
}

// errClosed is what calls get after Close.
var errClosed = fmt.Errorf("nbd: connection closed: %w", net.ErrClosed)

func (c *Conn) read(p []byte, off uint64) error {
	call := &call{p: p, done: make(chan error, 1)}
	c.mu.Lock()
	if c.err != nil {
		defer c.mu.Unlock()
		return c.err
	}
	c.last++
	cookie := c.last
	c.waiting[cookie] = call
	c.mu.Unlock()

	c.send(wire.Request{Command: wire.CmdRead, Cookie: cookie, Offset: off, Length: uint64(len(p))})
	return <-call.done
}

// send writes a request. If that fails the receiver ends, and with it every
// waiting call.
func (c *Conn) send(r wire.Request) {
	c.sending.Lock()
	defer c.sending.Unlock()
	if _, err := c.nc.Write(r.Append(make([]byte, 0, wire.RequestLen))); err != nil {
		c.fail(fmt.Errorf("cannot send a request: %w", err))
	}
}

// fail ends the connection for all callers; the first reason stays.
func (c *Conn) fail(err error) {
	c.mu.Lock()
	if c.err == nil {
		c.err = err
	}
	c.mu.Unlock()
	c.nc.Close()
}

// receive gives every reply to its call until the connection ends.
func (c *Conn) receive() {
	defer close(c.done)
	for {
		if err := c.receiveOne(); err != nil {
			c.fail(err)
			break
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for cookie, call := range c.waiting {
		delete(c.waiting, cookie)
		call.done <- c.err
	}
}

func (c *Conn) receiveOne() error {
	var b [wire.SimpleReplyLen]byte
	if _, err := io.ReadFull(c.in, b[:]); err != nil {
		return fmt.Errorf("connection lost: %w", unexpected(err))
	}
	reply, err := wire.ParseSimpleReply(&b)
	if err != nil {
		return err
	}
	c.mu.Lock()
	call := c.waiting[reply.Cookie]
	delete(c.waiting, reply.Cookie)
	c.mu.Unlock()
	if call == nil {
		return fmt.Errorf("server answered a request that was not made (cookie %#x)", reply.Cookie)
	}
	if reply.Errno != wire.Success {
		call.done <- &Error{Op: wire.CmdRead.String(), Errno: reply.Errno.Known()}
		return nil
	}
	if _, err := io.ReadFull(c.in, call.p); err != nil {
		err = fmt.Errorf("connection lost inside a reply: %w", unexpected(err))
		call.done <- err
		return err
	}
	call.done <- nil
	return nil
}

// unexpected keeps the end of a connection from being taken for the end of the
// export, which is what io.EOF means to users of an io.ReaderAt.
func unexpected(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

// closePatience is how long Close tries to tell the server.
const closePatience = 5 * time.Second

// Close sends NBD_CMD_DISC, so that the server ends in peace, and closes the
// connection. Calls that wait for an answer fail. No goroutine is left when it
// returns.
func (c *Conn) Close() error {
	c.mu.Lock()
	first := c.err == nil
	if first {
		c.err = errClosed
	}
	c.mu.Unlock()
	if first {
		// A server that reads nothing must not keep us, nor a request that
		// waits for it in front of us.
		c.nc.SetWriteDeadline(time.Now().Add(closePatience))
		c.send(wire.Request{Command: wire.CmdDisc})
	}
	err := c.nc.Close()
	<-c.done
	if !first || isGone(err) { // the server may close first
		return nil
	}
	return err
}
