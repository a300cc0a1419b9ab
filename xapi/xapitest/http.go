package xapitest

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"html"
	"io"
	"strconv"
	"strings"
)

const (
	// maxHeader is the buffer into which xapi reads the request line and the
	// headers of a unix connection.
	maxHeader = 1024
	// maxBody is xapi's limit of an XML-RPC request, 300 KiB.
	maxBody = 307200
)

// request is the part of an HTTP request that xapi uses.
type request struct {
	method, path  string
	version       string // the reply's: 1.0 only if that was asked for
	close         bool
	contentLength int64 // -1: not given
}

// httpError is an answer other than 200. It always ends the connection.
type httpError struct {
	status int
	reason string
	extra  string // HTML
}

func (e *httpError) Error() string { return fmt.Sprintf("%d %s", e.status, e.reason) }

func internalError(extra string) *httpError {
	return &httpError{500, "Internal Error", "<h1> Additional information </h1>" + html.EscapeString(extra)}
}

var statusText = map[int]string{
	403: "HTTP 403 forbidden",
	500: "HTTP 500 internal server error",
	501: "HTTP 501 Method Not Implemented",
}

// readRequest reads the request line and headers. It returns io.EOF when the
// peer closed before the block's end: xapi then closes without an answer.
func readRequest(br *bufio.Reader) (*request, error) {
	block, err := readHeaderBlock(br)
	if err != nil {
		return nil, err
	}
	lines := strings.Split(block, "\n")
	fields := strings.Fields(lines[0])
	if len(fields) != 3 || !strings.HasPrefix(fields[2], "HTTP/") {
		return nil, internalError("The HTTP headers could not be parsed.")
	}
	req := &request{method: fields[0], path: fields[1], version: "1.1", contentLength: -1}
	if fields[2] == "HTTP/1.0" {
		req.version, req.close = "1.0", true
	}
	for _, line := range lines[1:] {
		name, value, ok := strings.Cut(line, ":")
		if !ok {
			continue // xapi ignores a line without a colon
		}
		if err := req.header(strings.ToLower(name), strings.TrimSpace(value)); err != nil {
			return nil, err
		}
	}
	return req, nil
}

func (r *request) header(name, value string) error {
	switch name {
	case "content-length":
		n, err := strconv.ParseInt(value, 10, 64)
		if err != nil {
			return internalError(`Failure("Int64.of_string")`)
		}
		r.contentLength = n
	case "connection":
		switch strings.ToLower(value) {
		case "close":
			r.close = true
		case "keep-alive":
			r.close = false
		}
	}
	return nil
}

func readHeaderBlock(br *bufio.Reader) (string, error) {
	var block []byte
	for {
		c, err := br.ReadByte()
		if err != nil {
			return "", io.EOF
		}
		block = append(block, c)
		if len(block) > maxHeader {
			return "", internalError("The header block does not fit its buffer")
		}
		if bytes.HasSuffix(block, []byte("\r\n\r\n")) || bytes.HasSuffix(block, []byte("\n\n")) {
			return string(block), nil
		}
	}
}

// route returns an error for a request without an XML-RPC handler. Every POST path has the
// handler of "/", except those of JSON-RPC, which is not simulated.
func (r *request) route() error {
	switch r.method {
	case "POST":
		if strings.HasPrefix(r.path, "/json") {
			return &httpError{403, "Forbidden", ""}
		}
		return nil
	case "GET", "PUT", "CONNECT", "OPTIONS":
		return &httpError{403, "Forbidden", ""}
	}
	return &httpError{501, "Method not implemented", "<p>" + html.EscapeString(r.method) + " not supported.<br /></p>"}
}

// readBody reads exactly the announced bytes. Chunked bodies are not decoded:
// without a Content-Length there is no body to read.
func (r *request) readBody(br *bufio.Reader) ([]byte, error) {
	switch {
	case r.contentLength == -1:
		return nil, internalError(`Failure("We require a content-length: HTTP header")`)
	case r.contentLength > maxBody:
		return nil, internalError("Http_svr.Client_requested_size_over_limit")
	case r.contentLength < 0:
		return nil, internalError(`Invalid_argument("Bytes.create")`)
	}
	body := make([]byte, r.contentLength)
	if _, err := io.ReadFull(br, body); err != nil {
		return nil, io.EOF
	}
	return body, nil
}

// replyHead returns the head of a 200 answer. Errors that xapi raises before it
// dispatches the call carry no Access-Control headers.
func replyHead(r *request, length int, dispatched bool) []byte {
	connection := "keep-alive"
	if r.close {
		connection = "close"
	}
	b := fmt.Appendf(nil, "HTTP/%s 200 OK\r\ncontent-length: %d\r\nconnection: %s\r\n"+
		"cache-control: no-cache, no-store\r\ncontent-type: text/xml\r\n", r.version, length, connection)
	if dispatched {
		b = append(b, "Access-Control-Allow-Origin: *\r\nAccess-Control-Allow-Headers: X-Requested-With\r\n"...)
	}
	return append(b, "\r\n"...)
}

// errorReply returns the whole answer for err, or nil if xapi sends none.
func errorReply(r *request, err error) []byte {
	var he *httpError
	if !errors.As(err, &he) {
		return nil
	}
	version := "1.1"
	if r != nil {
		version = r.version
	}
	body := "<html><body><h1>" + statusText[he.status] + "</h1>" + he.extra + "</body></html>"
	return fmt.Appendf(nil, "HTTP/%s %d %s\r\ncontent-length: %d\r\ncontent-type: text/html\r\n"+
		"connection: close\r\ncache-control: no-cache, no-store\r\n\r\n%s", version, he.status, he.reason, len(body), body)
}
