package xapitest

import (
	"fmt"
	"strconv"
	"strings"
	"time"
)

// An XML-RPC value is one of string, int64, bool, float64, dateTime, base64Data,
// null, array and structure.
type (
	dateTime   string
	base64Data string
	null       struct{}
	array      []any
	member     struct {
		name  string
		value any
	}
	structure []member
)

// get returns the member called name; with duplicates the first one counts.
func (s structure) get(name string) (any, bool) {
	for _, m := range s {
		if m.name == name {
			return m.value, true
		}
	}
	return nil, false
}

// dateTimeOf writes the date without dashes but the time with colons, as xapi does.
func dateTimeOf(t time.Time) dateTime {
	return dateTime(t.UTC().Format("20060102T15:04:05Z"))
}

func stringArray(ss []string) array {
	a := make(array, 0, len(ss))
	for _, s := range ss {
		a = append(a, s)
	}
	return a
}

const (
	envelopeStart = `<?xml version="1.0"?><methodResponse><params><param>`
	envelopeEnd   = `</param></params></methodResponse>`
)

func encodeSuccess(v any) []byte {
	return encodeReply(structure{{"Status", "Success"}, {"Value", v}})
}

func encodeFailure(f *failure) []byte {
	description := append(array{f.code}, stringArray(f.params)...)
	return encodeReply(structure{{"Status", "Failure"}, {"ErrorDescription", description}})
}

func encodeReply(s structure) []byte {
	b := append([]byte(nil), envelopeStart...)
	b = appendValue(b, s)
	return append(b, envelopeEnd...)
}

// appendValue writes v as xapi's XML-RPC library does: strings and integers
// carry no type element, and member names are not escaped, so that a hostile
// map key yields malformed XML as it does on a real host.
func appendValue(b []byte, v any) []byte {
	b = append(b, "<value>"...)
	switch v := v.(type) {
	case string:
		b = appendText(b, v)
	case int64:
		b = strconv.AppendInt(b, v, 10)
	case bool:
		digit := byte('0')
		if v {
			digit = '1'
		}
		b = append(b, "<boolean>"...)
		b = append(b, digit)
		b = append(b, "</boolean>"...)
	case float64:
		b = fmt.Appendf(b, "<double>%s</double>", formatFloat(v))
	case dateTime:
		b = fmt.Appendf(b, "<dateTime.iso8601>%s</dateTime.iso8601>", string(v))
	case null:
		b = append(b, "<nil/>"...)
	case array:
		b = append(b, "<array><data>"...)
		for _, e := range v {
			b = appendValue(b, e)
		}
		b = append(b, "</data></array>"...)
	case structure:
		b = append(b, "<struct>"...)
		for _, m := range v {
			b = append(b, "<member><name>"...)
			b = append(b, m.name...)
			b = append(b, "</name>"...)
			b = appendValue(b, m.value)
			b = append(b, "</member>"...)
		}
		b = append(b, "</struct>"...)
	default:
		panic(fmt.Sprintf("xapitest: a handler returned a %T", v))
	}
	return append(b, "</value>"...)
}

// appendText escapes four characters and silently drops control characters
// other than tab, LF and CR. Bytes from 0x80 pass through.
func appendText(b []byte, s string) []byte {
	for i := 0; i < len(s); i++ {
		switch c := s[i]; {
		case c == '<':
			b = append(b, "&lt;"...)
		case c == '>':
			b = append(b, "&gt;"...)
		case c == '&':
			b = append(b, "&amp;"...)
		case c == '"':
			b = append(b, "&quot;"...)
		case c >= 0x20 || c == '\t' || c == '\n' || c == '\r':
			b = append(b, c)
		}
	}
	return b
}

// formatFloat formats like C's %.16g. Go's formats differ: the exponent has at least two
// digits here, and no trailing zeros.
func formatFloat(f float64) string {
	s := strconv.FormatFloat(f, 'g', 16, 64)
	mantissa, exponent, has := strings.Cut(s, "e")
	if strings.Contains(mantissa, ".") {
		mantissa = strings.TrimRight(strings.TrimRight(mantissa, "0"), ".")
	}
	if !has {
		return mantissa
	}
	return mantissa + "e" + exponent
}

// show formats a value like OCaml's Rpc.to_string, which xapi uses in the texts of
// unmarshalling errors.
func show(v any) string {
	switch v := v.(type) {
	case string:
		return "S(" + v + ")"
	case int64:
		return fmt.Sprintf("I(%d)", v)
	case bool:
		return fmt.Sprintf("B(%t)", v)
	case float64:
		return fmt.Sprintf("F(%g)", v)
	case dateTime:
		return "D(" + string(v) + ")"
	case base64Data:
		return "B64(" + string(v) + ")"
	case array:
		parts := make([]string, 0, len(v))
		for _, e := range v {
			parts = append(parts, show(e))
		}
		return "[" + strings.Join(parts, ";") + "]"
	case structure:
		parts := make([]string, 0, len(v))
		for _, m := range v {
			parts = append(parts, m.name+":"+show(m.value))
		}
		return "{" + strings.Join(parts, ";") + "}"
	}
	return "N"
}
