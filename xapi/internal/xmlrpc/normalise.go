package xmlrpc

import (
	"bytes"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
)

// maxDepth bounds the nesting of values. The deepest reply the service reads (a
// map of records holding maps, in the reply struct) needs five levels. Decoding
// recurses per level, 16 MiB have room for 800,000 of them, which take seconds,
// and a stack overflow is the one panic that recover does not stop.
const maxDepth = 32

// normalise checks that body, once repaired, is one well-formed envelope and returns
// its value in the dialect that kolo decodes without loss: every scalar is a
// <boolean> or a <string>, there is no text beside elements, no empty name, no
// CDATA, and no member that occurs twice in its struct.
func normalise(body []byte) ([]byte, error) {
	n := &normaliser{dec: xml.NewDecoder(bytes.NewReader(repair(body)))}
	if err := n.document(); err != nil {
		return nil, err
	}
	return n.out.Bytes(), nil
}

type normaliser struct {
	dec *xml.Decoder // strict: it pairs tags and refuses invalid characters
	out bytes.Buffer
}

func (n *normaliser) document() error {
	for _, name := range []string{"methodResponse", "params", "param", "value"} {
		if err := n.open(name); err != nil {
			return err
		}
	}
	if err := n.value(0); err != nil {
		return err
	}
	for range 3 { // param, params, methodResponse
		if err := n.close(); err != nil {
			return err
		}
	}
	switch _, err := n.next(); {
	case errors.Is(err, io.EOF):
		return nil
	case err != nil:
		return err
	default:
		return errors.New("more than one document")
	}
}

// token returns the next token, or io.EOF after the end of the document. It drops the errors
// of the XML package, which quote names and entities: in a damaged reply those could be any
// part of it.
func (n *normaliser) token() (xml.Token, error) {
	tok, err := n.dec.Token()
	if err != nil && !errors.Is(err, io.EOF) {
		err = fmt.Errorf("not well-formed XML at byte %d", n.dec.InputOffset())
	}
	return tok, err
}

// next returns the next start or end element where only elements may stand.
func (n *normaliser) next() (xml.Token, error) {
	for {
		tok, err := n.token()
		if err != nil {
			return nil, err
		}
		switch t := tok.(type) {
		case xml.StartElement, xml.EndElement:
			return t, nil
		case xml.CharData:
			if len(bytes.TrimSpace(t)) > 0 {
				return nil, errors.New("text between elements")
			}
		}
	}
}

// open consumes the start of the element name.
func (n *normaliser) open(name string) error {
	tok, err := n.next()
	if err != nil {
		return err
	}
	start, ok := tok.(xml.StartElement)
	if !ok {
		return fmt.Errorf("no <%s>", name)
	}
	if start.Name.Local == "fault" {
		// xapi reports its errors in the reply struct and has no faults.
		return errors.New("XML-RPC fault")
	}
	if start.Name.Local != name {
		return unexpected(name)
	}
	return nil
}

// close consumes the end of the current element.
func (n *normaliser) close() error {
	tok, err := n.next()
	if err != nil {
		return err
	}
	if _, ok := tok.(xml.StartElement); ok {
		return unexpected("an end")
	}
	return nil
}

// unexpected does not name the element that was found, see normalise.
func unexpected(want string) error { return fmt.Errorf("an element instead of %s", want) }

// text consumes character data up to the next element, which it returns.
func (n *normaliser) text() ([]byte, xml.Token, error) {
	var text []byte
	for {
		tok, err := n.token()
		if err != nil {
			return nil, nil, err
		}
		switch t := tok.(type) {
		case xml.CharData:
			text = append(text, t...)
		case xml.StartElement, xml.EndElement:
			return text, t, nil
		}
	}
}

// value rewrites a value whose start has been consumed, up to and including its
// end. Untyped text is a string, white space included; it is only dropped where
// it merely indents a typed element.
func (n *normaliser) value(depth int) error {
	if depth > maxDepth {
		return fmt.Errorf("values nested deeper than %d", maxDepth)
	}
	text, tok, err := n.text()
	if err != nil {
		return err
	}
	n.out.WriteString("<value>")
	if start, ok := tok.(xml.StartElement); ok {
		if len(bytes.TrimSpace(text)) > 0 {
			return errors.New("text beside an element in a value")
		}
		if err := n.typed(start.Name.Local, depth); err != nil {
			return err
		}
		if err := n.close(); err != nil {
			return err
		}
	} else {
		n.scalar("string", text)
	}
	n.out.WriteString("</value>")
	return nil
}

// typed rewrites the element inside a value. Its start has been consumed.
func (n *normaliser) typed(name string, depth int) error {
	switch name {
	case "struct":
		return n.members(depth)
	case "array":
		return n.elements(depth)
	}
	text, tok, err := n.text()
	if err != nil {
		return err
	}
	if _, ok := tok.(xml.StartElement); ok {
		return unexpected("text")
	}
	switch name {
	case "boolean":
		text = bytes.TrimSpace(text)
		if s := string(text); s != "0" && s != "1" {
			return errors.New("boolean is neither 0 nor 1")
		}
		n.scalar("boolean", text)
	case "string":
		n.scalar("string", text)
	case "int", "i4", "i8", "double", "dateTime.iso8601", "base64", "nil":
		n.scalar("string", bytes.TrimSpace(text))
	default:
		return errors.New("value of unknown type")
	}
	return nil
}

func (n *normaliser) scalar(name string, text []byte) {
	n.out.WriteString("<" + name + ">")
	xml.EscapeText(&n.out, text) // a bytes.Buffer never fails
	n.out.WriteString("</" + name + ">")
}

func (n *normaliser) elements(depth int) error {
	if err := n.open("data"); err != nil {
		return err
	}
	n.out.WriteString("<array><data>")
	for {
		tok, err := n.next()
		if err != nil {
			return err
		}
		start, ok := tok.(xml.StartElement)
		if !ok {
			break
		}
		if start.Name.Local != "value" {
			return unexpected("value")
		}
		if err := n.value(depth + 1); err != nil {
			return err
		}
	}
	n.out.WriteString("</data></array>")
	return n.close()
}

func (n *normaliser) members(depth int) error {
	n.out.WriteString("<struct>")
	seen := make(map[string]bool)
	for {
		tok, err := n.next()
		if err != nil {
			return err
		}
		start, ok := tok.(xml.StartElement)
		if !ok {
			break
		}
		if start.Name.Local != "member" {
			return unexpected("member")
		}
		if err := n.member(seen, depth); err != nil {
			return err
		}
	}
	n.out.WriteString("</struct>")
	return nil
}

// member rewrites one name and value. A member that occurs twice is refused:
// xapi never sends one, but a map key with markup in it, which xapi does not
// escape, could be made to override a field of its record that way.
func (n *normaliser) member(seen map[string]bool, depth int) error {
	if err := n.open("name"); err != nil {
		return err
	}
	name, tok, err := n.text()
	if err != nil {
		return err
	}
	if _, ok := tok.(xml.StartElement); ok {
		return unexpected("a member name")
	}
	if seen[string(name)] {
		return errors.New("member occurs twice")
	}
	seen[string(name)] = true

	begin := n.out.Len()
	n.out.WriteString("<member>")
	n.scalar("name", name)
	if err := n.open("value"); err != nil {
		return err
	}
	if err := n.value(depth + 1); err != nil {
		return err
	}
	n.out.WriteString("</member>")
	if len(name) == 0 {
		n.out.Truncate(begin) // kolo would refuse the whole reply
	}
	return n.close()
}
