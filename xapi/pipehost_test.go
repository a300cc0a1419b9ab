package xapi

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"time"
)

// pipeHost is a xapi at the other end of net.Pipe, for tests in fake time. A login takes
// loginTime and returns "OpaqueRef:<number of the login>"; other calls return "" at once.
type pipeHost struct {
	loginTime time.Duration

	mu      sync.Mutex
	logins  int
	logouts []string // refs, in the order of their logouts
}

// pipeLocal returns a Local of such a host. It must be called in a synctest bubble.
func pipeLocal(loginTime time.Duration) (*Local, *pipeHost) {
	c, h := New(Config{CallTimeout: time.Minute}), &pipeHost{loginTime: loginTime}
	c.transport.DialContext = func(context.Context, string, string) (net.Conn, error) {
		ours, theirs := net.Pipe()
		go h.serve(theirs)
		return ours, nil
	}
	return NewLocal(c, "test"), h
}

func (h *pipeHost) serve(conn net.Conn) {
	defer conn.Close()
	req, err := http.ReadRequest(bufio.NewReader(conn))
	if err != nil {
		return
	}
	body, err := io.ReadAll(req.Body)
	if err != nil {
		return
	}
	if !strings.Contains(string(body), loginMethod) {
		_, ref, _ := strings.Cut(string(body), "<string>")
		ref, _, _ = strings.Cut(ref, "</string>")
		h.mu.Lock()
		h.logouts = append(h.logouts, ref)
		h.mu.Unlock()
		io.WriteString(conn, ok(successXML("")))
		return
	}
	h.mu.Lock()
	h.logins++
	answer := ok(successXML(fmt.Sprintf("OpaqueRef:%d", h.logins)))
	h.mu.Unlock()
	<-time.After(h.loginTime)
	io.WriteString(conn, answer)
}

func (h *pipeHost) counts() (logins int, logouts string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.logins, strings.Join(h.logouts, " ")
}
