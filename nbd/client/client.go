package client

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"time"

	"xapi-nbd/nbd/wire"
)

// Config says how a client connects. The zero value is a client in the
// clear that asks for everything it knows.
type Config struct {
	// TLSConfig makes the client demand TLS: without it on the server's side
	// there is no connection. Nil means no TLS.
	TLSConfig *tls.Config

	// NoStructured keeps the client from asking for structured replies, and
	// for extended headers, which imply them. NoExtended does that for
	// extended headers alone. The default is to ask, and to cope without.
	NoStructured, NoExtended bool

	// MetaContexts are the metadata contexts that Go asks for, such as
	// [wire.BaseAllocation]. Without structured replies there are none.
	MetaContexts []string

	// ProgressTimeout ends a [Conn] on which nothing is sent or received for
	// that long although requests are outstanding, with a [*StallError]. While a
	// FLUSH, or a request with FUA, is outstanding it is ten times as long. A
	// Conn without outstanding requests may be idle for ever. 0 means no limit.
	ProgressTimeout time.Duration
}

// Client is the client's end of a connection that is still haggling. Its
// methods must not be called concurrently. It ends with Go, which turns it
// into a [Conn], or with Abort.
//
// A refusal by the server is an [*Error], after which the Client is as good as
// before; only NBD_REP_ERR_SHUTDOWN ends it. Every other error of an exchange
// ends the connection.
type Client struct {
	nc       net.Conn
	cfg      Config
	fixed    bool // the server speaks fixed newstyle
	flags    wire.ClientFlags
	mode     replyMode
	tlsState *tls.ConnectionState
	ended    error // why no more can be asked
}

// Dial connects and greets, starts TLS if cfg asks for it, and agrees on the
// kind of replies; cfg may be nil. ctx bounds all of that. Like crypto/tls it
// takes the name to verify from addr if cfg has none. The caller ends the Client
// with Go or Abort.
func Dial(ctx context.Context, network, addr string, cfg *Config) (*Client, error) {
	var d net.Dialer
	nc, err := d.DialContext(ctx, network, addr)
	if err != nil {
		return nil, err
	}
	c, err := New(ctx, nc, withServerName(cfg, addr))
	if err != nil {
		nc.Close()
		return nil, err
	}
	return c, nil
}

func withServerName(cfg *Config, addr string) *Config {
	if cfg == nil || cfg.TLSConfig == nil || cfg.TLSConfig.ServerName != "" || cfg.TLSConfig.InsecureSkipVerify {
		return cfg
	}
	host, _, err := net.SplitHostPort(addr)
	if err != nil { // a unix socket
		return cfg
	}
	named := *cfg
	named.TLSConfig = cfg.TLSConfig.Clone()
	named.TLSConfig.ServerName = host
	return &named
}

// New is Dial over a connection that exists. On error the caller closes
// nc.
func New(ctx context.Context, nc net.Conn, cfg *Config) (*Client, error) {
	c := &Client{nc: nc}
	if cfg != nil {
		c.cfg = *cfg
	}
	defer c.bound(ctx)()
	if err := c.greet(); err != nil {
		return nil, ctxErr(ctx, err)
	}
	if err := c.prepare(ctx); err != nil {
		if isRefused(err) {
			c.leave() // still haggling
		}
		return nil, ctxErr(ctx, err)
	}
	return c, nil
}

// prepare starts TLS before anything else is said, and agrees on the replies.
func (c *Client) prepare(ctx context.Context) error {
	if c.cfg.TLSConfig != nil {
		if !c.fixed {
			return errNotFixed(wire.OptStartTLS)
		}
		if err := c.startTLS(ctx, c.cfg.TLSConfig); err != nil {
			return err
		}
	}
	return c.chooseReplies()
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

// TLS is the state of the TLS connection, nil in the clear.
func (c *Client) TLS() *tls.ConnectionState { return c.tlsState }

// Structured reports whether structured replies were agreed on, by themselves
// or with extended headers.
func (c *Client) Structured() bool { return c.mode != simpleReplies }

// Extended reports whether extended headers were agreed on.
func (c *Client) Extended() bool { return c.mode == extendedHeaders }

// Abort ends the haggling softly: NBD_OPT_ABORT, then closing without waiting
// for an answer that some servers never give. A server that knows no such
// option is left by closing. After Go, and after the end of the connection, it
// does nothing.
func (c *Client) Abort() error {
	if c.ended != nil {
		return nil
	}
	c.ended = errClosed
	var err error
	if c.fixed {
		err = c.leave()
	}
	return errors.Join(err, c.nc.Close())
}

// leave tells the server that the client goes, but not for long if it does not
// listen.
func (c *Client) leave() error {
	c.nc.SetWriteDeadline(time.Now().Add(closePatience))
	_, err := c.nc.Write(wire.AppendOption(nil, wire.OptAbort, nil))
	return err
}

// exchange runs one option, or several that belong together, and decides what
// an error means for the connection.
func (c *Client) exchange(ctx context.Context, run func() error) error {
	if c.ended != nil {
		return c.ended
	}
	defer c.bound(ctx)()
	err := run()
	switch {
	case err == nil || errors.Is(err, ErrUnsupported) || errors.Is(err, errLocal):
	case !isRefused(err):
		c.ended = err
		c.nc.Close() // out of step with the server; there is no way back
	case isReply(err, wire.RepErrShutdown):
		c.ended = err
		c.leave()
		c.nc.Close()
	}
	return ctxErr(ctx, err)
}
