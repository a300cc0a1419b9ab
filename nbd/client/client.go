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

// Config is the configuration of a connection. The zero value connects without TLS and
// asks for every extension of the protocol that this package supports.
type Config struct {
	// TLSConfig makes the client require TLS: connecting fails if the server does
	// not offer it. Nil means no TLS.
	TLSConfig *tls.Config

	// NoStructured keeps the client from asking for structured replies and for
	// extended headers, which imply them; NoExtended, from asking for extended
	// headers. By default the client asks for both, and works without them if the
	// server refuses.
	NoStructured, NoExtended bool

	// MetaContexts are the metadata contexts that [Client.Go] asks for, such as
	// [wire.BaseAllocation]. [Conn.MetaContexts] returns those that the server
	// granted. Without structured replies a server grants none.
	MetaContexts []string

	// ProgressTimeout ends a [Conn] with a [*StallError] if nothing is sent or
	// received for that long while requests are outstanding. Data is sent in pieces of
	// 256 KiB, each of which has to be sent within that time. The limit is ten times
	// as long while a FLUSH, a WRITE_ZEROES, a TRIM or a request with FUA is
	// outstanding, because a server may have much to do for it. A Conn without
	// outstanding requests may be idle for any time. 0 means no limit.
	ProgressTimeout time.Duration
}

// Client is a connection in the handshake, section "Session handshake": it can list,
// describe and open exports. Its methods must not be called concurrently. The caller ends
// it with [Client.Go], which turns the connection into a [Conn], or with [Client.Abort].
//
// If the server refuses a call, the error is an [*Error] and the Client can be used
// further, unless the refusal is NBD_REP_ERR_SHUTDOWN. After every other error of the
// server or the network the connection is closed, and later calls return that error.
type Client struct {
	nc       net.Conn
	cfg      Config
	fixed    bool // the server speaks fixed newstyle
	flags    wire.ClientFlags
	mode     replyMode
	tlsState *tls.ConnectionState
	ended    error // of later calls; nil while the handshake goes on
}

// Dial connects to a server and begins the handshake: it exchanges the greetings, starts
// TLS if cfg asks for it, and negotiates structured replies or extended headers. network
// and addr are those of [net.Dial], such as "tcp" and "host:10809", or "unix" and a path.
// A nil cfg means the zero value. If cfg.TLSConfig has no ServerName, Dial verifies the
// certificate for the host of addr.
//
// ctx limits Dial, not the connection. The caller ends the Client with [Client.Go] or
// [Client.Abort].
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
	if err != nil { // addr is the path of a unix socket
		return cfg
	}
	named := *cfg
	named.TLSConfig = cfg.TLSConfig.Clone()
	named.TLSConfig.ServerName = host
	return &named
}

// New is like [Dial] for a connection that exists already. nc belongs to the Client; but
// if New returns an error, the caller must close nc.
func New(ctx context.Context, nc net.Conn, cfg *Config) (*Client, error) {
	c := &Client{nc: nc}
	if cfg != nil {
		c.cfg = *cfg
	}
	defer c.limitTo(ctx)()
	if err := c.greet(); err != nil {
		return nil, ctxErr(ctx, err)
	}
	if err := c.negotiate(ctx); err != nil {
		if isRefused(err) {
			c.sendAbort() // the server still waits for an option
		}
		return nil, ctxErr(ctx, err)
	}
	return c, nil
}

// negotiate starts TLS, before any other option is sent in the clear, and then negotiates
// the form of replies.
func (c *Client) negotiate(ctx context.Context) error {
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

// limitTo makes reads and writes of the connection fail when ctx is done, until the
// returned function is called: a net.Conn takes deadlines, not contexts.
func (c *Client) limitTo(ctx context.Context) func() {
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
		nc.SetDeadline(time.Time{}) // nothing has failed if ctx ended after the last read
	}
}

// ctxErr adds the cause of ctx to an error, if ctx is done: the error is then only how
// the connection failed because of it.
func ctxErr(ctx context.Context, err error) error {
	if cause := context.Cause(ctx); err != nil && cause != nil {
		return fmt.Errorf("%w (%w)", cause, err)
	}
	return err
}

// TLS returns the state of the TLS connection, or nil without TLS.
func (c *Client) TLS() *tls.ConnectionState { return c.tlsState }

// Structured reports whether the server sends structured replies, either by themselves or
// with extended headers.
func (c *Client) Structured() bool { return c.mode != simpleReplies }

// Extended reports whether client and server use extended headers.
func (c *Client) Extended() bool { return c.mode == extendedHeaders }

// Abort ends the handshake and closes the connection. It sends NBD_OPT_ABORT, if the
// server supports options that it may refuse, and does not wait for the reply, which some
// servers never send. After [Client.Go] has succeeded, and after the connection has ended,
// Abort does nothing.
func (c *Client) Abort() error {
	if c.ended != nil {
		return nil
	}
	c.ended = errClosed
	var err error
	if c.fixed {
		err = c.sendAbort()
	}
	return errors.Join(err, c.nc.Close())
}

// sendAbort sends NBD_OPT_ABORT. It gives up after closeTimeout if the server does not
// read.
func (c *Client) sendAbort() error {
	c.nc.SetWriteDeadline(time.Now().Add(closeTimeout))
	_, err := c.nc.Write(wire.AppendOption(nil, wire.OptAbort, nil))
	return err
}

// exchange calls run, which sends one option or several that belong together, and decides
// whether the connection can be used after an error.
func (c *Client) exchange(ctx context.Context, run func() error) error {
	if c.ended != nil {
		return c.ended
	}
	defer c.limitTo(ctx)()
	err := run()
	switch {
	case err == nil || errors.Is(err, ErrUnsupported) || errors.Is(err, errArgument):
	case !isRefused(err):
		c.ended = err
		c.nc.Close() // client and server may disagree about where the next message begins
	case isReply(err, wire.RepErrShutdown):
		c.ended = err
		c.sendAbort()
		c.nc.Close()
	}
	return ctxErr(ctx, err)
}
