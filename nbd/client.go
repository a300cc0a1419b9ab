package nbd

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"math"
	"net"
	"time"

	"xapi-nbd/nbd/wire"
)

// ClientConfig says how a client connects. The zero value is a client in the
// clear.
type ClientConfig struct {
	// TLSConfig makes the client demand TLS: without it on the server's side
	// there is no connection. Nil means no TLS.
	TLSConfig *tls.Config
}

// Client is the client's end of a connection that is still haggling. Its
// methods must not be called concurrently. It ends with Go, which turns it
// into a [Conn], or with Abort.
type Client struct {
	nc    net.Conn
	flags wire.ClientFlags
}

// Dial connects and greets, and starts TLS if cfg asks for it; cfg may be nil.
// ctx bounds all of that. The caller ends the Client with Go or Abort.
func Dial(ctx context.Context, network, addr string, cfg *ClientConfig) (*Client, error) {
	var d net.Dialer
	nc, err := d.DialContext(ctx, network, addr)
	if err != nil {
		return nil, err
	}
	c, err := NewClient(ctx, nc, cfg)
	if err != nil {
		nc.Close()
		return nil, err
	}
	return c, nil
}

// NewClient is Dial over a connection that exists. On error the caller closes
// nc.
func NewClient(ctx context.Context, nc net.Conn, cfg *ClientConfig) (*Client, error) {
	c := &Client{nc: nc}
	defer c.bound(ctx)()
	if err := c.greet(); err != nil {
		return nil, ctxErr(ctx, err)
	}
	if cfg != nil && cfg.TLSConfig != nil {
		if err := c.startTLS(ctx, cfg.TLSConfig); err != nil {
			var refused *Error
			if errors.As(err, &refused) {
				// Still haggling: leave softly.
				_, _ = nc.Write(wire.AppendOption(nil, wire.OptAbort, nil))
			}
			return nil, ctxErr(ctx, err)
		}
	}
	return c, nil
}

// bound makes the connection fail when ctx ends, until the returned function
// is called: sockets do not hear contexts.
func (c *Client) bound(ctx context.Context) func() {
	nc := c.nc
	ended := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(ended)
		nc.SetDeadline(aLongTimeAgo)
	})
	return func() {
		if !stop() {
			<-ended
		}
		nc.SetDeadline(time.Time{}) // if ctx ended too late, it has not failed anything
	}
}

// ctxErr prefers the end of ctx to what it did to the connection.
func ctxErr(ctx context.Context, err error) error {
	if cause := context.Cause(ctx); err != nil && cause != nil {
		return fmt.Errorf("%w (%w)", cause, err)
	}
	return err
}

// Abort ends the haggling softly: NBD_OPT_ABORT, then closing without waiting
// for an answer that some servers never give.
func (c *Client) Abort() error {
	_, err := c.nc.Write(wire.AppendOption(nil, wire.OptAbort, nil))
	return errors.Join(err, c.nc.Close())
}

// Go asks for an export and starts the transmission phase. A refusal is an
// [*Error], after which the Client is as good as before. ctx bounds the
// negotiation only. The caller closes the Conn, which ends the connection.
func (c *Client) Go(ctx context.Context, name string) (*Conn, error) {
	defer c.bound(ctx)()
	info, err := c.optGo(name)
	if err != nil {
		return nil, ctxErr(ctx, err)
	}
	switch {
	case info.Flags&wire.FlagHasFlags == 0:
		err = errors.New("server sent transmission flags without NBD_FLAG_HAS_FLAGS")
	case info.Size > math.MaxInt64:
		err = fmt.Errorf("server sent an absurd size, %d bytes", info.Size)
	}
	if err != nil {
		// The server is in the transmission phase; there is no way back.
		return nil, errors.Join(err, c.nc.Close())
	}
	return newConnOf(c.nc, bufio.NewReaderSize(c.nc, 64<<10), *info), nil
}
