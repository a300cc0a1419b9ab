package xapitest

import (
	"bytes"
	"encoding/base64"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
)

type tokenKind int

const (
	startToken tokenKind = iota
	endToken
	dataToken
	endOfInput
)

type token struct {
	kind tokenKind
	text string // element name or character data
}

// parser reads a methodCall with the rules of xapi's parser, which differ from
// a general one: which elements may be empty, and when white space counts.
type parser struct {
	dec    *xml.Decoder
	queued []token // at most two: character data is merged up to the next tag
}

// parseCall decodes a request body. Any error means that xapi would answer
// HTTP 500. Bytes after the closing tag of methodCall are ignored.
func parseCall(body []byte) (method string, params []any, err error) {
	p := &parser{dec: xml.NewDecoder(bytes.NewReader(body))}
	err = p.element("methodCall", func() error {
		if err := p.element("methodName", func() (err error) { method, err = p.data(); return err }); err != nil {
			return err
		}
		return p.element("params", func() error {
			return p.until(func() error {
				return p.element("param", func() error {
					v, err := p.value()
					params = append(params, v)
					return err
				})
			})
		})
	})
	return method, params, err
}

// next returns the next token. It skips comments and processing instructions.
func (p *parser) next() (token, error) {
	if len(p.queued) > 0 {
		t := p.queued[0]
		p.queued = p.queued[1:]
		return t, nil
	}
	var data strings.Builder
	hasData := false
	for {
		raw, err := p.dec.Token()
		if err != nil && !errors.Is(err, io.EOF) {
			return token{}, err
		}
		t := token{kind: endOfInput}
		switch raw := raw.(type) {
		case xml.CharData:
			data.Write(raw)
			hasData = true
			continue
		case xml.StartElement:
			t = token{startToken, raw.Name.Local}
		case xml.EndElement:
			t = token{endToken, raw.Name.Local}
		case nil:
		default:
			continue
		}
		if hasData {
			p.queued = append(p.queued, t)
			return token{dataToken, data.String()}, nil
		}
		return t, nil
	}
}

func (p *parser) peek() (token, error) {
	t, err := p.next()
	if err == nil {
		p.queued = append([]token{t}, p.queued...)
	}
	return t, err
}

func blank(s string) bool { return strings.Trim(s, " \t\n") == "" }

// tag returns the next token that is not white space; it must be of kind want.
func (p *parser) tag(want tokenKind) (string, error) {
	for {
		t, err := p.next()
		switch {
		case err != nil:
			return "", err
		case t.kind == want:
			return t.text, nil
		case t.kind == dataToken && blank(t.text):
		default:
			return "", fmt.Errorf("unexpected %q in the XML-RPC call", t.text)
		}
	}
}

func (p *parser) element(name string, inside func() error) error {
	got, err := p.tag(startToken)
	if err != nil {
		return err
	}
	if got != name {
		return fmt.Errorf("got open_tag(%s) while open_tag(%s) was expected", got, name)
	}
	if err := inside(); err != nil {
		return err
	}
	_, err = p.tag(endToken)
	return err
}

// until runs each for every child up to the enclosing element's end tag, which
// it leaves in place.
func (p *parser) until(each func() error) error {
	for {
		t, err := p.peek()
		if err != nil {
			return err
		}
		switch {
		case t.kind == dataToken && blank(t.text):
			_, _ = p.next()
		case t.kind == endToken:
			return nil
		default:
			if err := each(); err != nil {
				return err
			}
		}
	}
}

func (p *parser) data() (string, error) {
	t, err := p.next()
	if err == nil && t.kind != dataToken {
		err = fmt.Errorf("got tag %q while data was expected", t.text)
	}
	return t.text, err
}

func (p *parser) value() (v any, err error) {
	err = p.element("value", func() error {
		t, err := p.peek()
		if err != nil {
			return err
		}
		switch t.kind {
		case endToken:
			v = ""
			return nil
		case dataToken:
			_, _ = p.next()
			following, err := p.peek()
			if err != nil {
				return err
			}
			if !blank(t.text) || following.kind != startToken {
				v = t.text
				return nil
			}
		}
		v, err = p.typed()
		return err
	})
	return v, err
}

// typed reads a value inside its type element.
func (p *parser) typed() (v any, err error) {
	name, err := p.tag(startToken)
	if err != nil {
		return nil, err
	}
	t, err := p.peek()
	if err != nil {
		return nil, err
	}
	if t.kind == endToken {
		v, err = emptyElement(name)
	} else {
		v, err = p.content(name)
	}
	if err != nil {
		return nil, err
	}
	_, err = p.tag(endToken)
	return v, err
}

func emptyElement(name string) (any, error) {
	switch name {
	case "string", "value":
		return "", nil
	case "array":
		return array{}, nil
	case "struct":
		return structure{}, nil
	case "nil":
		return null{}, nil
	}
	return nil, fmt.Errorf("empty_%s", name)
}

func (p *parser) content(name string) (any, error) {
	switch name {
	case "array":
		a := array{}
		err := p.element("data", func() error {
			return p.until(func() error {
				v, err := p.value()
				a = append(a, v)
				return err
			})
		})
		return a, err
	case "struct":
		s := structure{}
		err := p.until(func() error {
			var m member
			err := p.element("member", func() (err error) {
				if err = p.element("name", func() (err error) { m.name, err = p.data(); return err }); err != nil {
					return err
				}
				m.value, err = p.value()
				return err
			})
			s = append(s, m)
			return err
		})
		return s, err
	case "nil":
		return null{}, nil
	}
	text, err := p.data()
	if err != nil {
		return nil, err
	}
	return scalar(name, text)
}

func scalar(name, text string) (any, error) {
	switch name {
	case "int", "i4", "i8":
		return strconv.ParseInt(text, 10, 64)
	case "boolean":
		return text == "1", nil // any other text is false
	case "double":
		return strconv.ParseFloat(text, 64)
	case "string":
		return text, nil
	case "dateTime.iso8601":
		return dateTime(text), nil
	case "base64":
		b, err := base64.StdEncoding.DecodeString(text)
		return base64Data(b), err
	}
	return nil, fmt.Errorf("got open_tag(%s) while a type was expected", name)
}
