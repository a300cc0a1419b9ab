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

// Conn is an open export: a connection in the transmission phase. All methods may be called
// concurrently; the requests are then in flight at the same time, and the server may reply
// to them in any order. The caller must call [Conn.Close].
//
// If the server fails a command, the error is an [*Error] with its errno, inside an
// [*OffsetError] if the server said where, and the Conn can be used further. If the
// connection breaks, all calls fail with a [*LostError]; if the server violates the
// protocol, with an error that says how; after [Config.ProgressTimeout], with a
// [*StallError]. [Conn.Done] and [Conn.Err] tell that the connection has ended.
//
// When the context of a call is done, the call returns at once, its buffer belongs to the
// caller again, and the late reply is dropped. The Conn can be used further, with one
// exception: if half of the request has been sent over TLS, the rest cannot be sent, so the
// connection ends.
//
// If the server announces that it shuts down (NBD_ESHUTDOWN), new calls fail, and the
// connection ends when the server has replied to all outstanding requests.
type Conn struct {
	info     wire.ExportInfo
	mode     replyMode
	contexts metaContexts
	nc       net.Conn
	in       *bufio.Reader
	incoming *incoming     // under in
	done     chan struct{} // closed when the goroutine of receive has ended

	sending chan struct{} // the send token: full while a request is being sent
	scratch []byte        // room for a header; used by the holder of the send token

	mu             sync.Mutex // guards the fields below, and the deadlines of nc
	last           uint64     // the cookie of the newest request
	waiting        map[uint64]*call
	err            error     // why new calls fail; nil while they do not
	serverLeaves   bool      // the server shuts down: end when no call waits
	noMoreRequests bool      // only NBD_CMD_DISC may still be sent
	ended          bool      // the goroutine of receive has ended
	sendErr        error     // why sending failed
	writeEnd       time.Time // the write deadline, unless a call is being given up
	readEnd        time.Time // the read deadline, unless a call is being given up

	timeout      time.Duration // ProgressTimeout
	began        time.Time
	lastProgress atomic.Int64  // nanoseconds after began
	beingSent    *wire.Request // nil if no request is being sent; guarded by mu, like:
	stall        *time.Timer
	watching     bool // whether the timer stall runs
}

// call is one request that waits for its reply.
type call struct {
	req  wire.Request
	done chan error // gets the result

	// Used by the goroutine of receive only, until it sends the result.
	received    spans
	failure     error // the first error chunk
	emptyChunks int   // the number of chunks without content
	status      statusCollector

	// Guarded by Conn.mu.
	begun     bool          // the reply has begun to arrive
	p         []byte        // the buffer of a READ; nil once the call is given up
	filling   bool          // the goroutine of receive writes to p
	abandoned chan struct{} // closed when it has stopped, after the call was given up
}

func newConnOf(nc net.Conn, info wire.ExportInfo, timeout time.Duration) *Conn {
	c := &Conn{
		info: info, nc: nc, timeout: timeout, began: time.Now(),
		done: make(chan struct{}), sending: make(chan struct{}, 1), waiting: make(map[uint64]*call),
	}
	c.incoming = &incoming{c: c, most: receiveBuffer}
	c.in = bufio.NewReaderSize(c.incoming, receiveBuffer)
	return c
}

// Size returns the size of the export in bytes.
func (c *Conn) Size() int64 { return int64(c.info.Size) }

// Info returns the server's information about the export. See [Conn.BlockSizes] for the
// size constraints that the client observes.
func (c *Conn) Info() wire.ExportInfo { return c.info }

// MetaContexts returns the names of the metadata contexts that the server has granted, of
// those in [Config]. [Conn.BlockStatus] can be called for them.
func (c *Conn) MetaContexts() []string { return c.contexts.names() }

// Done returns a channel that is closed when the connection has ended.
func (c *Conn) Done() <-chan struct{} { return c.done }

// Err returns why new calls fail, or nil while they do not. After [Conn.Close] it matches
// [net.ErrClosed].
func (c *Conn) Err() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

// errClosed is the error of calls after Close.
var errClosed = fmt.Errorf("nbd: connection closed: %w", net.ErrClosed)

// roundTrip sends a request and waits for the end of its reply. payload is the data of a
// WRITE, call.p the buffer of a READ; neither is used after the return.
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

// register gives the call a cookie and adds it to the waiting ones.
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

// forget removes a call whose request was not sent.
func (c *Conn) forget(call *call) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.waiting, call.req.Cookie)
	if c.serverLeaves && len(c.waiting) == 0 {
		c.nc.SetReadDeadline(aLongTimeAgo) // ends the read in receive, which then disconnects
	}
}

// abandon gives a call up: when it returns, the buffer is not used any more. The call stays
// in the map, so that its late reply is read and dropped.
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

// fail ends the connection. The first error is the one that all calls return.
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

// receive reads replies and ends their calls, until the connection ends. It runs in a
// goroutine of its own.
func (c *Conn) receive() {
	defer close(c.done)
	for {
		err := c.receiveOne()
		if c.canDisconnect() {
			c.disconnect()
			c.nc.Close()
			break
		}
		if err != nil {
			c.fail(c.reason(err))
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

// reason returns the error of sending, if sending failed and the server sent nothing more,
// otherwise err, which ended the receiving.
func (c *Conn) reason(err error) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.sendErr != nil && neterr.IsTimeout(err) {
		return c.sendErr
	}
	return err
}

// canDisconnect reports whether the server shuts down and has replied to all requests.
func (c *Conn) canDisconnect() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.serverLeaves && len(c.waiting) == 0
}

// callOf returns the call with that cookie, whose reply has begun to arrive.
func (c *Conn) callOf(cookie uint64) (*call, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if call := c.waiting[cookie]; call != nil {
		call.begun = true
		return call, nil
	}
	return nil, fmt.Errorf("server answered a request that was not made (cookie %#x)", cookie)
}

// finish ends a call with its result. After NBD_ESHUTDOWN no new requests are sent, section
// "Terminating the transmission phase".
func (c *Conn) finish(call *call, err error) {
	c.mu.Lock()
	delete(c.waiting, call.req.Cookie)
	if errors.Is(err, wire.ESHUTDOWN) {
		err = fmt.Errorf("the server is shutting down: %w", err)
		c.serverLeaves = true
		if c.err == nil {
			c.err = err
		}
	}
	c.mu.Unlock()
	call.done <- err
}

// fill reads n bytes into the buffer of a call, from index at on. If the call is given up,
// even while they arrive, it drops the rest of them.
func (c *Conn) fill(call *call, at, n uint64) error {
	var got int
	if p := c.beginFill(call); p != nil {
		var err error
		got, err = c.readData(p[at : at+n])
		if abandoned := c.endFill(call); err != nil && (!abandoned || !neterr.IsTimeout(err)) {
			return lost(true, err)
		}
	}
	return c.skip(n - uint64(got))
}

// beginFill returns the buffer of a call, which must not be given up before endFill; nil if
// the call was given up.
func (c *Conn) beginFill(call *call) []byte {
	c.mu.Lock()
	defer c.mu.Unlock()
	call.filling = call.p != nil
	return call.p
}

// endFill ends the use of the buffer, and reports whether the call waits for that in order
// to be given up.
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

// skip reads n bytes and drops them.
func (c *Conn) skip(n uint64) error {
	if n == 0 {
		return nil
	}
	c.incoming.most = receiveBuffer
	if _, err := io.CopyN(io.Discard, c.in, int64(n)); err != nil {
		return lost(true, err)
	}
	return nil
}

// unexpected replaces io.EOF by io.ErrUnexpectedEOF: to a user of an io.ReaderAt, io.EOF
// would mean the end of the export.
func unexpected(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}
