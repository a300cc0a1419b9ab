package client

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"xapi-nbd/nbd/internal/neterr"
	"xapi-nbd/nbd/wire"
)

// Conn is the client's end of a connection in the transmission phase. All
// methods may be called concurrently: the requests share the connection, and
// each gets its own answer by its cookie. Close ends it.
//
// A failed command is an [*Error] with its errno, in an [*OffsetError] if the
// server said where; the connection goes on. When the context of a call ends the
// call returns at once and its memory is the caller's again; the late answer is
// dropped, and the connection goes on. There is one exception: a request that
// was half sent over TLS cannot be completed, so giving it up ends the connection.
//
// A server that says it is shutting down (NBD_ESHUTDOWN) gets no new requests;
// the connection ends softly when those under way are answered.
type Conn struct {
	info     wire.ExportInfo
	mode     replyMode
	contexts metaContexts
	nc       net.Conn
	in       *bufio.Reader
	done     chan struct{} // closed when the receiver has ended

	sending chan struct{} // holds a token while somebody sends
	scratch []byte        // for the sender

	mu       sync.Mutex // guards what follows, and deadlines
	last     uint64     // the newest cookie
	waiting  map[uint64]*call
	err      error     // why there are no new requests
	leaving  bool      // the server shuts down: end when nobody waits
	quit     bool      // nothing more is sent, apart from NBD_CMD_DISC
	ended    bool      // the receiver has ended
	sendErr  error     // why nothing more can be sent
	writeEnd time.Time // the write deadline unless a call is given up
	readEnd  time.Time // the same for reading

	timeout      time.Duration // ProgressTimeout
	began        time.Time     // lastProgress counts from here
	lastProgress atomic.Int64
	beingSent    *wire.Request // nil if none is; guarded by mu, as are:
	stall        *time.Timer
	watching     bool // stall runs
}

// call is one request that waits for its answer.
type call struct {
	req  wire.Request
	done chan error // receives once

	// The receiver's own, until done.
	have    spans
	failure error
	idle    int // chunks without content
	status  statusCollector

	// Guarded by Conn.mu.
	begun     bool   // some of the reply has come
	p         []byte // where a READ puts its data; nil once abandoned
	filling   bool   // the receiver writes to p
	abandoned chan struct{}
}

func newConnOf(nc net.Conn, info wire.ExportInfo, timeout time.Duration) *Conn {
	c := &Conn{
		info: info, nc: nc, timeout: timeout, began: time.Now(),
		done: make(chan struct{}), sending: make(chan struct{}, 1), waiting: make(map[uint64]*call),
	}
	c.in = bufio.NewReaderSize(progressReader{c}, receiveBuffer)
	return c
}

// Size is the export's size in bytes.
func (c *Conn) Size() int64 { return int64(c.info.Size) }

// Info is what the server said of the export.
func (c *Conn) Info() wire.ExportInfo { return c.info }

// MetaContexts are the metadata contexts that the server granted of those that
// were asked for.
func (c *Conn) MetaContexts() []string { return c.contexts.names() }

// Done is closed when the connection has ended.
func (c *Conn) Done() <-chan struct{} { return c.done }

// Err says why the connection takes no more requests, nil while it does. After
// Close it matches [net.ErrClosed].
func (c *Conn) Err() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

// errClosed is what calls get after Close.
var errClosed = fmt.Errorf("nbd: connection closed: %w", net.ErrClosed)

// roundTrip sends a request and waits for the end of its answer. payload is
// what a WRITE sends, call.p where a READ receives; neither is touched after the
// return.
func (c *Conn) roundTrip(ctx context.Context, call *call, payload []byte) error {
	if err := context.Cause(ctx); err != nil {
		return fmt.Errorf("%v: %w", call.req.Command, err)
	}
	call.done = make(chan error, 1)
	if err := c.register(call); err != nil {
		return err
	}
	sent, err := c.send(ctx, call.req, payload)
	if !sent {
		c.forget(call)
	}
	if err != nil {
		return fmt.Errorf("%v: %w", call.req.Command, err)
	}
	select {
	case err := <-call.done:
		return err
	case <-ctx.Done():
		c.abandon(call)
		return fmt.Errorf("%v: %w", call.req.Command, context.Cause(ctx))
	}
}

// register gives the call its cookie.
func (c *Conn) register(call *call) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		return c.err
	}
	c.watchProgress()
	c.last++
	call.req.Cookie = c.last
	c.waiting[c.last] = call
	return nil
}

// forget is for a call of which the server knows nothing.
func (c *Conn) forget(call *call) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.waiting, call.req.Cookie)
	if c.leaving && len(c.waiting) == 0 {
		c.nc.SetReadDeadline(aLongTimeAgo) // wakes the receiver, to leave
	}
}

// abandon takes the caller's memory back. The cookie stays known, so that the
// late answer is read and dropped.
func (c *Conn) abandon(call *call) {
	c.mu.Lock()
	call.p = nil
	call.abandoned = make(chan struct{})
	filling := call.filling
	if filling {
		c.nc.SetReadDeadline(aLongTimeAgo)
	}
	c.mu.Unlock()
	if filling {
		<-call.abandoned
	}
}

// fail ends the connection for all callers; the first reason stays.
func (c *Conn) fail(err error) {
	c.mu.Lock()
	if c.err == nil {
		var lost *LostError
		if errors.As(err, &lost) {
			lost.Outstanding = len(c.waiting)
		}
		c.err = err
	}
	c.mu.Unlock()
	c.nc.Close()
}

// receive gives every reply to its call until the connection ends.
func (c *Conn) receive() {
	defer close(c.done)
	for {
		err := c.receiveOne()
		if c.mayLeave() {
			c.disconnect()
			c.nc.Close()
			break
		}
		if err != nil {
			c.fail(c.whyEnded(err))
			break
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.ended = true
	if c.stall != nil {
		c.stall.Stop()
	}
	for cookie, call := range c.waiting {
		delete(c.waiting, cookie)
		call.done <- c.err
	}
}

// whyEnded is why sending failed if the server said nothing more after that, else
// the receiver's own error.
func (c *Conn) whyEnded(err error) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.sendErr != nil && neterr.IsTimeout(err) {
		return c.sendErr
	}
	return err
}

func (c *Conn) mayLeave() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.leaving && len(c.waiting) == 0
}

// callOf is the call with that cookie.
func (c *Conn) callOf(cookie uint64) (*call, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if call := c.waiting[cookie]; call != nil {
		call.begun = true
		return call, nil
	}
	return nil, fmt.Errorf("server answered a request that was not made (cookie %#x)", cookie)
}

// finish ends a call. NBD_ESHUTDOWN also begins the end of the connection,
// section "Terminating the transmission phase".
func (c *Conn) finish(call *call, err error) {
	c.mu.Lock()
	delete(c.waiting, call.req.Cookie)
	if errors.Is(err, wire.ESHUTDOWN) {
		err = fmt.Errorf("the server is shutting down: %w", err)
		c.leaving = true
		if c.err == nil {
			c.err = err
		}
	}
	c.mu.Unlock()
	call.done <- err
}

// fill reads n bytes into the caller's memory, or drops them if it was taken
// back, even in the middle. at is where in the caller's memory they belong.
func (c *Conn) fill(call *call, at, n uint64) error {
	var got int
	if p := c.beginFill(call); p != nil {
		var err error
		got, err = io.ReadFull(c.in, p[at:at+n])
		if abandoned := c.endFill(call); err != nil && (!abandoned || !neterr.IsTimeout(err)) {
			return lost(true, err)
		}
	}
	return c.skip(n - uint64(got))
}

// beginFill lends the caller's memory to the receiver; nil if that is gone.
func (c *Conn) beginFill(call *call) []byte {
	c.mu.Lock()
	defer c.mu.Unlock()
	call.filling = call.p != nil
	return call.p
}

// endFill gives it back, and reports whether the caller wants it.
func (c *Conn) endFill(call *call) (abandoned bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	call.filling = false
	if call.abandoned == nil {
		return false
	}
	c.nc.SetReadDeadline(c.readEnd)
	close(call.abandoned)
	return true
}

// skip drops n bytes.
func (c *Conn) skip(n uint64) error {
	if n == 0 {
		return nil
	}
	if _, err := io.CopyN(io.Discard, c.in, int64(n)); err != nil {
		return lost(true, err)
	}
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
