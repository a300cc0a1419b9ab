package xapi

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptrace"
	"strings"
	"sync/atomic"
	"time"

	"xapi-nbd/xapi/internal/xmlrpc"
)

// Config configures a Client. A zero field means its default.
type Config struct {
	// Socket is the path of xapi's unix socket. Connections to the socket that
	// xapi itself binds count as local root.
	Socket string
	// UserAgent is the User-Agent header, which xapi logs and by which it limits clients.
	// The default, "xapi-nbd", also replaces one that is longer than 128 bytes or not
	// printable ASCII.
	UserAgent string
	// CallTimeout bounds logins and getters. Default 60s.
	CallTimeout time.Duration
	// MutateTimeout bounds VBD.create, plug, unplug and destroy, and
	// VDI.list_changed_blocks, when their context has no earlier deadline. Default 3h: xapi itself queues a plug for up to two
	// hours while another operation holds the VDI.
	MutateTimeout time.Duration
	// MaxResponseBytes is the longest reply body that is read, except for the bitmap of
	// VDI.list_changed_blocks, whose length follows from its disk. Default 16 MiB.
	MaxResponseBytes int64
	// Logger gets one debug line per call; nil discards.
	Logger *slog.Logger
	// Observe, if set, is called at the end of each call with its error: nil, an *Error or a
	// *TransportError. It is called concurrently.
	Observe func(method string, took time.Duration, err error)
}

const (
	defaultUserAgent   = "xapi-nbd"
	defaultCall        = time.Minute
	defaultMutate      = 3 * time.Hour
	defaultMaxResponse = 16 << 20

	// maxUserAgent keeps the header block far below the 1024 bytes that xapi
	// reads on the unix socket (http.ml, read_http_request_header).
	maxUserAgent = 128
	// maxResponseHeader is far more than xapi's headers, about 200 bytes.
	maxResponseHeader = 64 << 10
)

// Client makes calls to one xapi. It is safe for concurrent use and holds no
// connection between calls.
type Client struct {
	cfg       Config
	log       *slog.Logger
	transport *http.Transport

	unreadable unreadableLog
}

// New returns a client for the xapi at cfg.Socket. It does not connect.
func New(cfg Config) *Client {
	if !validUserAgent(cfg.UserAgent) {
		cfg.UserAgent = defaultUserAgent
	}
	if cfg.CallTimeout <= 0 {
		cfg.CallTimeout = defaultCall
	}
	if cfg.MutateTimeout <= 0 {
		cfg.MutateTimeout = defaultMutate
	}
	if cfg.MaxResponseBytes <= 0 {
		cfg.MaxResponseBytes = defaultMaxResponse
	}
	log := cfg.Logger
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	return &Client{cfg: cfg, log: log, transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return dial(ctx, cfg.Socket)
		},
		// One connection per call, getters included. If a reused connection was closed
		// by a restart of xapi, nobody could tell whether VBD.create was executed, and
		// net/http would repeat getters by itself and print unsolicited bytes, which may
		// contain a session ref, to the standard logger. Connecting to a local socket
		// takes microseconds, a call of xapi milliseconds.
		DisableKeepAlives:      true,
		DisableCompression:     true,
		MaxResponseHeaderBytes: maxResponseHeader,
	}}
}

// validUserAgent reports whether ua is short, printable ASCII. net/http refuses calls with
// other headers.
func validUserAgent(s string) bool {
	printable := func(r rune) bool { return r >= ' ' && r <= '~' }
	return s != "" && len(s) <= maxUserAgent &&
		strings.IndexFunc(s, func(r rune) bool { return !printable(r) }) < 0
}

// Close closes idle connections. It does not end calls in progress; their contexts do. The
// client may be used again.
func (c *Client) Close() { c.transport.CloseIdleConnections() }

// request is one call. params are its positional parameters; secret is the session ref
// among them, which must not be in errors.
type request struct {
	method  string
	secret  string
	timeout time.Duration
	params  []any
}

// invoke makes the call q and returns its result, or an *Error, a *TransportError,
// or an error matching ErrArgument.
func invoke[T any](ctx context.Context, c *Client, q request) (T, error) {
	return invokeWith(ctx, c, q, func(body io.Reader) (xmlrpc.Reply[T], error) {
		answer, err := io.ReadAll(io.LimitReader(body, c.cfg.MaxResponseBytes+1))
		switch {
		case err != nil:
			return xmlrpc.Reply[T]{}, err
		case int64(len(answer)) > c.cfg.MaxResponseBytes:
			return xmlrpc.Reply[T]{}, fmt.Errorf("%w than %d bytes", errTooLong, c.cfg.MaxResponseBytes)
		}
		return xmlrpc.Decode[T](answer)
	})
}

// invokeWith is like invoke; decode reads the body of the reply.
func invokeWith[T any](ctx context.Context, c *Client, q request, decode func(body io.Reader) (xmlrpc.Reply[T], error)) (T, error) {
	var none T
	body, err := xmlrpc.Encode(q.method, q.params...)
	if err != nil {
		return none, fmt.Errorf("xapi: %s: %w", q.method, err)
	}
	ctx, cancel := context.WithTimeout(ctx, q.timeout)
	defer cancel()

	start := time.Now()
	value, err := exchange(ctx, c, q, body, decode)
	if c.cfg.Observe != nil {
		c.cfg.Observe(q.method, time.Since(start), err)
	}
	if c.log.Enabled(ctx, slog.LevelDebug) {
		attrs := []slog.Attr{slog.String("method", q.method), slog.Duration("took", time.Since(start))}
		if err != nil {
			attrs = append(attrs, slog.Any("err", err))
		}
		c.log.LogAttrs(ctx, slog.LevelDebug, "xapi call", attrs...)
	}
	return value, err
}

var errTooLong = errors.New("reply is longer")

func exchange[T any](ctx context.Context, c *Client, q request, call []byte, decode func(io.Reader) (xmlrpc.Reply[T], error)) (T, error) {
	var none T
	answer, sent, err := c.post(ctx, call)
	if err != nil {
		return none, q.transportError(sent, err)
	}
	defer answer.Close()
	body := &bodyReader{r: answer}
	reply, err := decode(body)
	switch {
	case body.err != nil: // also if decode succeeded
		return none, q.transportError(true, transportCause(ctx, body.err))
	case err != nil:
		return none, q.transportError(true, &answerError{err})
	case reply.Status == xmlrpc.Failure:
		return none, newError(q.method, reply.ErrorDescription, q.secret)
	}
	return reply.Value, nil
}

// bodyReader reads the body of a reply and records the error that ended it, except io.EOF.
type bodyReader struct {
	r   io.Reader
	err error
}

func (b *bodyReader) Read(p []byte) (int, error) {
	n, err := b.r.Read(p)
	if err != nil && !errors.Is(err, io.EOF) {
		b.err = err
	}
	return n, err
}

// transportError wraps err. If the text of err contains the session ref it wraps an error
// without that text and without err.
func (q request) transportError(sent bool, err error) error {
	if q.secret != "" && strings.Contains(err.Error(), q.secret) {
		withheld := errors.New("error text withheld, it contains " + redacted)
		if errors.Is(err, ErrAnswer) {
			withheld = &answerError{withheld}
		}
		err = withheld
	}
	return &TransportError{Method: q.method, Sent: sent, Err: err}
}

// post posts body and returns the body of a 200 answer, which the caller closes. sent
// reports that there was a connection, so xapi may have received the call.
//
// It uses the transport instead of an http.Client, which would follow redirects and store
// cookies.
func (c *Client) post(ctx context.Context, body []byte) (answer io.ReadCloser, sent bool, err error) {
	var connected atomic.Bool // net/http calls the trace from its own goroutines
	traced := httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{
		GotConn: func(httptrace.GotConnInfo) { connected.Store(true) },
	})
	// A reader with a size: xapi requires Content-Length and does not support chunked bodies.
	req, err := http.NewRequestWithContext(traced, http.MethodPost, "http://localhost/", bytes.NewReader(body))
	if err != nil {
		return nil, false, err
	}
	req.Header.Set("User-Agent", c.cfg.UserAgent)
	req.Header.Set("Content-Type", "text/xml")

	resp, err := c.transport.RoundTrip(req)
	if err != nil {
		return nil, connected.Load(), transportCause(ctx, err)
	}
	if resp.StatusCode != http.StatusOK {
		resp.Body.Close()
		// An error outside the call's execution; its HTML body may quote the call.
		return nil, true, &answerError{fmt.Errorf("HTTP status %d", resp.StatusCode)}
	}
	return resp.Body, true, nil
}
