package xmlrpc

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
)

// The start of the value of a successful reply, as xapi writes it. White space may stand
// between the two parts, and a <string> after them.
const (
	valueName   = "<name>Value</name>"
	valueStart  = "<value>"
	stringStart = "<string>"
)

// placeholder replaces the long text in the document that is decoded. xapi never sends it,
// so finding it as the result proves that the text was the result.
const placeholder = "\uE000the long text\uE000"

// DecodeLongText reads a methodResponse document whose result is one text that is too
// long to be held in memory. The text is not held: consume reads it, once, until io.EOF.
// It comes as it is on the wire, so it must not hold characters that XML escapes.
//
// The rest of the document may have up to limit bytes and is checked as by [Decode].
// Value is empty in the returned reply. consume is not called when the document has no
// text at the place of the result, as in a reply with the status Failure. An error of
// consume is returned as it is, after nothing more was read; all others match
// ErrMalformed. The text that consume has read is valid only if there was no error and the
// status is Success.
func DecodeLongText(r io.Reader, limit int, consume func(text io.Reader) error) (Reply[string], error) {
	br := bufio.NewReaderSize(r, 64<<10)
	document, found, err := readHead(br, limit)
	if err != nil {
		return Reply[string]{}, err
	}
	if found {
		if err := consume(&textReader{br: br}); err != nil {
			return Reply[string]{}, err
		}
		document = append(document, placeholder...)
		if document, err = readRest(br, document, limit); err != nil {
			return Reply[string]{}, err
		}
	}
	reply, err := Decode[string](document)
	if err != nil {
		return Reply[string]{}, err
	}
	switch {
	case reply.Status != Success:
	case !found || reply.Value != placeholder:
		return Reply[string]{}, fmt.Errorf("%w: the result is no text", ErrMalformed)
	}
	reply.Value = ""
	return reply, nil
}

// readHead reads up to the first byte of the text. Without a text it reads the whole
// document, and found is false.
func readHead(br *bufio.Reader, limit int) (head []byte, found bool, err error) {
	for {
		part, err := br.ReadSlice('>')
		head = append(head, part...)
		switch {
		case len(head) > limit:
			return nil, false, tooLong(limit)
		case errors.Is(err, bufio.ErrBufferFull):
		case errors.Is(err, io.EOF):
			return head, false, nil
		case err != nil:
			return nil, false, notRead(err)
		case endsWithValueStart(head):
			// An error comes again at the next read.
			if next, _ := br.Peek(len(stringStart)); string(next) == stringStart {
				head = append(head, next...)
				_, _ = br.Discard(len(next)) // it was peeked at
			}
			return head, true, nil
		}
	}
}

func endsWithValueStart(b []byte) bool {
	b, found := bytes.CutSuffix(b, []byte(valueStart))
	return found && bytes.HasSuffix(bytes.TrimRight(b, " \t\r\n"), []byte(valueName))
}

// readRest appends the bytes after the text to document.
func readRest(br *bufio.Reader, document []byte, limit int) ([]byte, error) {
	rest, err := io.ReadAll(io.LimitReader(br, int64(limit-len(document)+1)))
	if err != nil {
		return nil, notRead(err)
	}
	if document = append(document, rest...); len(document) > limit {
		return nil, tooLong(limit)
	}
	return document, nil
}

func tooLong(limit int) error { return fmt.Errorf("%w: longer than %d bytes", ErrMalformed, limit) }
func notRead(err error) error { return fmt.Errorf("%w: %w", ErrMalformed, err) }

// textReader reads up to the next tag.
type textReader struct{ br *bufio.Reader }

// Read implements io.Reader. A document that ends inside the text is
// io.ErrUnexpectedEOF.
func (t *textReader) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	if _, err := t.br.Peek(1); err != nil { // fills the buffer
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return 0, err
	}
	b, _ := t.br.Peek(min(t.br.Buffered(), len(p))) // it has that many
	if end := bytes.IndexByte(b, '<'); end >= 0 {
		b = b[:end]
	}
	if len(b) == 0 {
		return 0, io.EOF
	}
	n := copy(p, b)
	_, _ = t.br.Discard(n)
	return n, nil
}
