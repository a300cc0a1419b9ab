package xmlrpc

import (
	"errors"
	"fmt"
	"reflect"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	kolo "github.com/kolo/xmlrpc"
)

// ErrArgument is matched by the errors of Encode: the call cannot be encoded.
var ErrArgument = errors.New("invalid argument")

// MaxCallBytes is the longest body that xapi reads; a longer one is answered
// with HTTP 500 (http_svr.ml, constants.ml: 300 KiB).
const MaxCallBytes = 300 << 10

// Encode returns the methodCall document for method with args as its positional
// parameters. Arguments are strings of any string type, bools, slices and
// string-keyed maps of those, and structs whose exported fields (named by their
// xmlrpc tag) are those. A nil map is an empty struct and a nil slice an empty
// array. Everything else is refused with an error that matches ErrArgument, as
// are strings that are not valid UTF-8 or hold a character that XML or xapi
// would change. Error texts never repeat an argument.
func Encode(method string, args ...any) (body []byte, err error) {
	// A panic of kolo's reflection code must not end the service while it has plugged VBDs.
	defer func() {
		if p := recover(); p != nil {
			body, err = nil, fmt.Errorf("%w: encoder panic: %v", ErrArgument, p)
		}
	}()
	if !plainName(method) {
		return nil, fmt.Errorf("%w: method name", ErrArgument)
	}
	for i, arg := range args {
		if err := checkArgument(reflect.ValueOf(arg)); err != nil {
			return nil, fmt.Errorf("%w %d: %w", ErrArgument, i+1, err)
		}
	}
	if args == nil {
		args = []any{} // kolo leaves <params> out for nil, which xapi refuses
	}
	body, err = kolo.EncodeMethodCall(method, args...)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrArgument, err)
	}
	if len(body) > MaxCallBytes {
		return nil, fmt.Errorf("%w: call of %d bytes, xapi reads at most %d", ErrArgument, len(body), MaxCallBytes)
	}
	return body, nil
}

// plainName reports whether s needs no escaping: kolo does not escape method and member
// names.
func plainName(s string) bool {
	return s != "" && checkText(s) == nil && !strings.ContainsAny(s, `<>&"'`)
}

// checkArgument accepts the types that kolo encodes in a form that xapi accepts.
func checkArgument(v reflect.Value) error {
	switch v.Kind() {
	case reflect.String:
		if v.Type() == reflect.TypeFor[kolo.Base64]() {
			return errors.New("base64 is never right for xapi")
		}
		return checkText(v.String())
	case reflect.Bool:
		return nil
	case reflect.Slice:
		if v.Type().Elem().Kind() == reflect.Uint8 {
			return errors.New("bytes would become an array of integers")
		}
		for i := range v.Len() {
			if err := checkArgument(v.Index(i)); err != nil {
				return err
			}
		}
		return nil
	case reflect.Map:
		return checkMap(v)
	case reflect.Struct:
		return checkStruct(v)
	case reflect.Invalid:
		return errors.New("nil has no representation")
	default:
		return fmt.Errorf("type %s is not supported", v.Type())
	}
}

func checkMap(v reflect.Value) error {
	if v.Type().Key().Kind() != reflect.String {
		return fmt.Errorf("type %s: only string keys are supported", v.Type())
	}
	for it := v.MapRange(); it.Next(); {
		if !plainName(it.Key().String()) {
			return errors.New("map key is empty or holds a character that is not escaped")
		}
		if err := checkArgument(it.Value()); err != nil {
			return err
		}
	}
	return nil
}

func checkStruct(v reflect.Value) error {
	if v.Type() == reflect.TypeFor[time.Time]() {
		return errors.New("times are written without a zone")
	}
	for i := range v.NumField() {
		field := v.Type().Field(i)
		if !field.IsExported() {
			return fmt.Errorf("type %s has an unexported field", v.Type())
		}
		if err := checkArgument(v.Field(i)); err != nil {
			return fmt.Errorf("%s: %w", field.Name, err)
		}
	}
	return nil
}

// checkText refuses text that xapi would not receive unchanged: it answers invalid UTF-8
// with HTTP 500 and drops control characters, and the XML escaper replaces the two
// non-characters.
func checkText(s string) error {
	if !utf8.ValidString(s) {
		return errors.New("text is not valid UTF-8")
	}
	for _, r := range s {
		if unicode.IsControl(r) || r == '\uFFFE' || r == '\uFFFF' {
			return errors.New("text holds a control character")
		}
	}
	return nil
}
