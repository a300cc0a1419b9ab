package xapi

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"xapi-nbd/test/leaks"
)

func TestMain(m *testing.M) { leaks.Main(m) }

// exchanged is one request as it was received.
type exchanged struct {
	raw    string // header block as sent
	header http.Header
	host   string
	body   string
}

// responder is an HTTP server on a unix socket that answers with fixed bytes, so that tests
// determine every byte on the wire.
type responder struct {
	Socket string

	mu       sync.Mutex
	requests []exchanged
}

// respond starts a responder. answer gets the number of the request, from 0, and
// returns raw bytes; then the connection is closed, as after `Connection: close`.
func respond(t *testing.T, answer func(n int, e exchanged) string) *responder {
	t.Helper()
	r := &responder{Socket: filepath.Join(t.TempDir(), "xapi")}
	l, err := net.Listen("unix", r.Socket)
	if err != nil {
		t.Fatal(err)
	}
	var serving sync.WaitGroup
	t.Cleanup(func() {
		l.Close()
		serving.Wait()
	})
	serving.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			serving.Go(func() { r.serve(conn, answer) })
		}
	})
	return r
}

func (r *responder) serve(conn net.Conn, answer func(int, exchanged) string) {
	defer conn.Close()
	var raw bytes.Buffer
	req, err := http.ReadRequest(bufio.NewReader(io.TeeReader(conn, &raw)))
	if err != nil {
		return
	}
	body, err := io.ReadAll(req.Body)
	if err != nil {
		return
	}
	head, _, _ := strings.Cut(raw.String(), "\r\n\r\n")
	e := exchanged{raw: head, header: req.Header, host: req.Host, body: string(body)}
	r.mu.Lock()
	n := len(r.requests)
	r.requests = append(r.requests, e)
	r.mu.Unlock()
	io.WriteString(conn, answer(n, e))
}

// seen returns the requests so far.
func (r *responder) seen() []exchanged {
	r.mu.Lock()
	defer r.mu.Unlock()
	return append([]exchanged(nil), r.requests...)
}

// ok wraps an XML body as xapi's HTTP server does.
func ok(body string) string {
	return fmt.Sprintf("HTTP/1.1 200 OK\r\ncontent-length: %d\r\nconnection: close\r\ncache-control: no-cache, no-store\r\n"+
		"content-type: text/xml\r\nAccess-Control-Allow-Origin: *\r\nAccess-Control-Allow-Headers: X-Requested-With\r\n\r\n%s", len(body), body)
}

const (
	envelope    = `<?xml version="1.0"?><methodResponse><params><param><value><struct>`
	envelopeEnd = `</struct></value></param></params></methodResponse>`
)

func member(name, value string) string {
	return "<member><name>" + name + "</name><value>" + value + "</value></member>"
}

func successXML(value string) string {
	return envelope + member("Status", "Success") + member("Value", value) + envelopeEnd
}

func failureXML(elements ...string) string {
	values := "<value>" + strings.Join(elements, "</value><value>") + "</value>"
	return envelope + member("Status", "Failure") + member("ErrorDescription", "<array><data>"+values+"</data></array>") + envelopeEnd
}

// always returns the same answer to each request.
func always(answer string) func(int, exchanged) string {
	return func(int, exchanged) string { return answer }
}

func testClient(t *testing.T, cfg Config) *Client {
	t.Helper()
	if cfg.CallTimeout == 0 {
		cfg.CallTimeout = 20 * time.Second // a test that hangs is a test that fails
	}
	c := New(cfg)
	t.Cleanup(c.Close)
	return c
}
