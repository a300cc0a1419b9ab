package xapi

import (
	"bytes"
	"context"
	"errors"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
)

const secret = "OpaqueRef:5ec7e75e-0000-4000-8000-000000000000"

// The request has the form that xapi's HTTP server requires: POST /, a Content-Length, a
// header block below 1 KiB. Each call has its own connection.
func TestRequestOnTheWire(t *testing.T) {
	r := respond(t, always(ok(successXML("some-uuid"))))
	s := testClient(t, Config{Socket: r.Socket, UserAgent: "xapi-nbd/1.0"}).Bind(secret)
	if got, err := s.UUID(t.Context()); err != nil || got != "some-uuid" {
		t.Fatalf("got %q, %v, want some-uuid", got, err)
	}
	if err := s.PlugVBD(t.Context(), "OpaqueRef:vbd"); err != nil {
		t.Fatal(err)
	}
	seen := r.seen()
	if len(seen) != 2 {
		t.Fatalf("got %d requests, want 2", len(seen))
	}
	for _, e := range seen {
		if first, _, _ := strings.Cut(e.raw, "\r\n"); first != "POST / HTTP/1.1" {
			t.Errorf("got request line %q, want POST / HTTP/1.1", first)
		}
		if len(e.raw) > 512 {
			t.Errorf("got %d bytes of headers, want far below 1024", len(e.raw))
		}
		if e.host != "localhost" {
			t.Errorf("got host %q, want localhost", e.host)
		}
		want := map[string]string{"User-Agent": "xapi-nbd/1.0", "Connection": "close", "Transfer-Encoding": "", "Accept-Encoding": "", "Expect": ""}
		for name, value := range want {
			if got := e.header.Get(name); got != value {
				t.Errorf("header %s: got %q, want %q", name, got, value)
			}
		}
		if e.header.Get("Content-Length") == "" && !strings.Contains(e.raw, "Content-Length: ") {
			t.Errorf("no Content-Length in %q", e.raw)
		}
	}
	const want = `<?xml version="1.0" encoding="UTF-8"?><methodCall><methodName>VBD.plug</methodName><params>` +
		`<param><value><string>` + secret + `</string></value></param><param><value><string>OpaqueRef:vbd</string></value></param></params></methodCall>`
	if diff := cmp.Diff(want, seen[1].body); diff != "" {
		t.Errorf("body (-want +got):\n%s", diff)
	}
}

// A call waits for a full backlog as long as its time limit allows.
func TestFullBacklog(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "xapi")
	fd, err := syscall.Socket(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	file := os.NewFile(uintptr(fd), socket)
	defer file.Close()
	if err := errors.Join(syscall.Bind(fd, &syscall.SockaddrUnix{Name: socket}), syscall.Listen(fd, 0)); err != nil {
		t.Fatal(err)
	}
	var waiting []net.Conn
	for err == nil {
		var c net.Conn
		if c, err = net.Dial("unix", socket); err == nil {
			waiting = append(waiting, c)
		}
	}
	if !errors.Is(err, syscall.EAGAIN) {
		t.Fatalf("got %v, want EAGAIN for a full backlog", err)
	}

	_, err = testClient(t, Config{Socket: socket, CallTimeout: 50 * time.Millisecond}).Bind(secret).UUID(t.Context())
	transport, is := errors.AsType[*TransportError](err)
	if !is || transport.Sent || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v, want that it waited, and nothing was sent", err)
	}

	l, err := net.FileListener(file)
	if err != nil {
		t.Fatal(err)
	}
	called := make(chan error, 1)
	go func() {
		_, err := testClient(t, Config{Socket: socket}).Bind(secret).UUID(t.Context())
		called <- err
	}()
	r := &responder{}
	var serving sync.WaitGroup
	serving.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			serving.Go(func() { r.serve(conn, always(ok(successXML("u")))) })
		}
	})
	if err := <-called; err != nil {
		t.Errorf("when there was room again: %v", err)
	}
	l.Close()
	for _, c := range waiting {
		c.Close()
	}
	serving.Wait()
}

func TestUserAgent(t *testing.T) {
	tests := []struct{ name, set, want string }{
		{"default", "", "xapi-nbd"},
		{"set", "other/2", "other/2"},
		{"unsendable", "a\r\nb: c", "xapi-nbd"},
		{"too long for xapi's header buffer", strings.Repeat("x", 1000), "xapi-nbd"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			r := respond(t, always(ok(successXML("u"))))
			if _, err := testClient(t, Config{Socket: r.Socket, UserAgent: tt.set}).Bind(secret).UUID(t.Context()); err != nil {
				t.Fatal(err)
			}
			if got := r.seen()[0].header.Get("User-Agent"); got != tt.want {
				t.Errorf("got %q, want %q", got, tt.want)
			}
		})
	}
}

// A usable answer is HTTP 200 with a complete reply.
func TestTransportErrors(t *testing.T) {
	reply := successXML("u")
	tests := []struct {
		name, answer string
		want         error // nil: any
	}{
		{"internal error", "HTTP/1.1 500 Internal Error\r\nconnection: close\r\ncontent-length: 6\r\n\r\n" + "<html>", nil},
		{"500 holding a good reply", strings.Replace(ok(reply), "200 OK", "500 Internal Error", 1), nil},
		{"redirect", "HTTP/1.1 302 Found\r\nlocation: http://localhost/RPC2\r\ncontent-length: 0\r\n\r\n", nil},
		{"no content", "HTTP/1.1 204 No Content\r\n\r\n", nil},
		{"nothing", "", io.ErrUnexpectedEOF},
		{"half a header", "HTTP/1.1 200 OK\r\ncontent-le", nil},
		{"half a body", ok(reply)[:len(ok(reply))-20], io.ErrUnexpectedEOF},
		{"half a body, no length", "HTTP/1.1 200 OK\r\n\r\n" + reply[:len(reply)-20], nil},
		{"no HTTP", reply, errNotHTTP},
		{"endless header", "HTTP/1.1 200 OK\r\nx: " + strings.Repeat("x", maxResponseHeader*2), errNotHTTP},
		{"malformed", ok("<methodResponse>"), nil},
		{"unescaped map key", ok(successXML("<struct>" + member("a&b", "v") + "</struct>")), nil},
		{"oversized", ok(successXML(strings.Repeat("x", 4096))), nil},
		{"empty result", ok(successXML("")), errEmpty},
		{"wrong type", ok(successXML("<boolean>1</boolean>")), nil},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			r := respond(t, always(tt.answer))
			_, err := testClient(t, Config{Socket: r.Socket, MaxResponseBytes: 4096}).Bind(secret).UUID(t.Context())
			transport, isTransport := errors.AsType[*TransportError](err)
			if !isTransport || !transport.Sent || transport.Method != "session.get_uuid" {
				t.Fatalf("got %v (%T), want a TransportError with Sent", err, err)
			}
			if tt.want != nil && !errors.Is(err, tt.want) {
				t.Errorf("got %v, want %v", err, tt.want)
			}
			if n := len(r.seen()); n != 1 {
				t.Errorf("got %d requests, want 1: no call is repeated silently", n)
			}
		})
	}
}

func TestOlderServers(t *testing.T) {
	reply := successXML("u")
	for name, answer := range map[string]string{
		"headers without blanks": strings.ReplaceAll(ok(reply), ": ", ":"),
		"HTTP/1.0":               strings.Replace(ok(reply), "HTTP/1.1", "HTTP/1.0", 1),
		"few headers":            "HTTP/1.1 200 OK\r\ncontent-type: text/xml\r\n\r\n" + reply,
		"exactly the limit":      ok(reply),
	} {
		t.Run(name, func(t *testing.T) {
			r := respond(t, always(answer))
			c := testClient(t, Config{Socket: r.Socket, MaxResponseBytes: int64(len(reply))})
			if got, err := c.Bind(secret).UUID(t.Context()); err != nil || got != "u" {
				t.Errorf("got %q, %v, want u", got, err)
			}
		})
	}
}

func TestDialFailureIsNotSent(t *testing.T) {
	c := testClient(t, Config{Socket: filepath.Join(t.TempDir(), "none")})
	_, err := c.Login(t.Context(), "test")
	transport, ok := errors.AsType[*TransportError](err)
	if !ok || transport.Sent {
		t.Fatalf("got %v, want a TransportError that was not sent", err)
	}
	if !errors.Is(err, fs.ErrNotExist) || !errors.Is(err, syscall.ENOENT) {
		t.Errorf("got %v, want it to match ENOENT", err)
	}
}

func TestCancelledBeforeTheCall(t *testing.T) {
	r := respond(t, always(ok(successXML(""))))
	why := errors.New("shutting down")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(why)
	err := testClient(t, Config{Socket: r.Socket}).Bind(secret).PlugVBD(ctx, "OpaqueRef:vbd")
	transport, ok := errors.AsType[*TransportError](err)
	if !ok || transport.Sent {
		t.Errorf("got %v, want a TransportError that was not sent", err)
	}
	if !errors.Is(err, why) || !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want it to match the cause and context.Canceled", err)
	}
	if n := len(r.seen()); n != 0 {
		t.Errorf("got %d requests, want none", n)
	}
}

// silent makes c talk to a peer that reads and never answers. It replaces the
// dialer so that the test can run in a bubble with fake time.
func silent(t *testing.T, c *Client) {
	c.transport.DialContext = func(context.Context, string, string) (net.Conn, error) {
		ours, theirs := net.Pipe()
		go io.Copy(io.Discard, theirs)
		t.Cleanup(func() { theirs.Close() })
		return ours, nil
	}
}

// Every call ends by its context or by the time limits of Config.
func TestTimeouts(t *testing.T) {
	cfg := Config{CallTimeout: time.Minute, MutateTimeout: 3 * time.Hour}
	tests := []struct {
		name   string
		ctx    time.Duration // 0: no deadline
		config Config
		call   func(context.Context, *Session) error
		want   time.Duration
	}{
		{"getter", 0, cfg, func(ctx context.Context, s *Session) error { _, err := s.UUID(ctx); return err }, time.Minute},
		{"getter by default", 0, Config{}, func(ctx context.Context, s *Session) error { _, err := s.UUID(ctx); return err }, time.Minute},
		{"login", 0, cfg, func(ctx context.Context, s *Session) error { _, err := s.c.Login(ctx, "x"); return err }, time.Minute},
		{"logout", 0, cfg, func(ctx context.Context, s *Session) error { return s.Logout(ctx) }, time.Minute},
		{"plug", 0, cfg, func(ctx context.Context, s *Session) error { return s.PlugVBD(ctx, "r") }, 3 * time.Hour},
		{"plug by default", 0, Config{}, func(ctx context.Context, s *Session) error { return s.PlugVBD(ctx, "r") }, 3 * time.Hour},
		{"create", 0, cfg, func(ctx context.Context, s *Session) error { _, err := s.CreateVBD(ctx, VBDSpec{}); return err }, 3 * time.Hour},
		{"plug with a deadline", 55 * time.Second, cfg, func(ctx context.Context, s *Session) error { return s.PlugVBD(ctx, "r") }, 55 * time.Second},
		{"getter with a later deadline", time.Hour, cfg, func(ctx context.Context, s *Session) error { _, err := s.UUID(ctx); return err }, time.Minute},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c := New(tt.config)
				silent(t, c)
				ctx := t.Context()
				if tt.ctx > 0 {
					var cancel context.CancelFunc
					ctx, cancel = context.WithTimeout(ctx, tt.ctx)
					defer cancel()
				}
				start := time.Now()
				err := tt.call(ctx, c.Bind(secret))
				if transport, ok := errors.AsType[*TransportError](err); !ok || !transport.Sent || !errors.Is(err, context.DeadlineExceeded) {
					t.Errorf("got %v, want a TransportError with Sent that matches DeadlineExceeded", err)
				}
				if got := time.Since(start); got != tt.want {
					t.Errorf("ended after %v, want %v", got, tt.want)
				}
			})
		})
	}
}

// Arguments that xapi would misread are not sent.
func TestUnsendableArguments(t *testing.T) {
	r := respond(t, always(ok(successXML("u"))))
	c := testClient(t, Config{Socket: r.Socket})
	s := c.Bind(secret)
	ctx := t.Context()
	calls := map[string]func() error{
		"control character": func() error { _, err := s.VDIByUUID(ctx, "a\x00b"); return err },
		"broken UTF-8":      func() error { _, err := s.VDIByUUID(ctx, "a\xff"); return err },
		"session ref":       func() error { _, err := c.Bind(secret + "\n").UUID(ctx); return err },
		"originator":        func() error { _, err := c.Login(ctx, "\x1b"); return err },
		"map key": func() error {
			_, err := s.CreateVBD(ctx, VBDSpec{OtherConfig: map[string]string{"a<b": ""}})
			return err
		},
		"too long for xapi":     func() error { _, err := s.VDIByUUID(ctx, strings.Repeat("x", 1<<20)); return err },
		"quote in a VM ref":     func() error { _, err := s.VBDsOfVM(ctx, `a" or true or field "VM"="`); return err },
		"blank in a VM ref":     func() error { _, err := s.VBDsOfVM(ctx, "a b"); return err },
		"backslash in a VM ref": func() error { _, err := s.VBDsOfVM(ctx, `a\`); return err },
		"quote in a VDI ref":    func() error { _, err := s.VBDsOfVDI(ctx, `a" or true or field "VM"="`); return err },
		"no VM ref":             func() error { _, err := s.VBDsOfVM(ctx, ""); return err },
	}
	for name, call := range calls {
		err := call()
		if !errors.Is(err, ErrArgument) {
			t.Errorf("%s: got %v, want ErrArgument", name, err)
		} else if strings.Contains(err.Error(), secret) {
			t.Errorf("%s: the error repeats the session ref", name)
		}
	}
	if n := len(r.seen()); n != 0 {
		t.Errorf("got %d requests, want none", n)
	}
}

// No error and no log line contains a session ref.
func TestSecretsStaySecret(t *testing.T) {
	answers := map[string]string{
		"SESSION_INVALID":         ok(failureXML("SESSION_INVALID", secret)),
		"SESSION_INVALID, other":  ok(failureXML("SESSION_INVALID", strings.Replace(secret, "0000", "1111", 1))),
		"HANDLE_INVALID":          ok(failureXML("HANDLE_INVALID", "session", secret)),
		"INTERNAL_ERROR":          ok(failureXML("INTERNAL_ERROR", "Db_exn.Read_missing_uuid(session, , "+secret+")")),
		"not HTTP":                secret + "\r\n\r\n",
		"header that is none":     "HTTP/1.1 200 OK\r\n" + secret + "\r\n\r\n",
		"status line":             "HTTP/1.1 500 " + secret + "\r\ncontent-length: 0\r\n\r\n",
		"malformed, as an entity": ok("<methodResponse>&" + secret + ";"),
		"malformed, as a tag":     ok("<" + secret + ">"),
		"malformed, unclosed tag": ok("<methodResponse><" + secret + "></x>"),
		"wrong type":              ok(successXML("<boolean>" + secret + "</boolean>")),
		"unknown type":            ok(successXML("<" + secret + "/>")),
		"other encoding":          ok(`<?xml version="1.0" encoding="` + secret + `"?>` + successXML("")),
	}
	for name, answer := range answers {
		t.Run(name, func(t *testing.T) {
			r := respond(t, always(answer))
			var log bytes.Buffer
			c := testClient(t, Config{Socket: r.Socket, Logger: slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug}))})
			s := c.Bind(secret)
			_, err := s.UUID(t.Context())
			if err == nil {
				t.Fatal("got no error")
			}
			for _, text := range append(formats(err), append(formats(s), log.String())...) {
				if strings.Contains(text, "5ec7e75e") {
					t.Errorf("secret in %q", text)
				}
			}
			if !strings.Contains(log.String(), "session.get_uuid") {
				t.Errorf("no line about the call in %q", log.String())
			}
		})
	}
}
