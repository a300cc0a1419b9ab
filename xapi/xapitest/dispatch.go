package xapitest

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"
)

// failure is an API error: a code and its parameters.
type failure struct {
	code   string
	params []string
}

func (f *failure) Error() string { return f.code }

func fail(code string, params ...string) *failure { return &failure{code, params} }

func handleInvalid(class, ref string) *failure { return fail("HANDLE_INVALID", class, ref) }

// ocamlFailure returns the failure with which xapi reports an unexpected exception.
func ocamlFailure(text string) *failure {
	return fail("INTERNAL_ERROR", fmt.Sprintf("Failure(%q)", text))
}

// kind is the type of a parameter on the wire.
type kind string

const (
	text      kind = "string" // refs, uuids and enums as well
	boolean   kind = "bool"
	strct     kind = "struct"
	stringMap kind = "map"
)

// unmarshal checks a parameter; the texts of its errors are those of xapi's codec.
func unmarshal(k kind, v any) error {
	ok := true
	switch k {
	case text:
		_, ok = v.(string)
	case boolean:
		_, ok = v.(bool)
	case strct:
		if _, ok := v.(structure); !ok {
			return ocamlFailure("bad __structure")
		}
	case stringMap:
		s, isStruct := v.(structure)
		if !isStruct {
			return ocamlFailure(fmt.Sprintf("Expected dictionary, got '%s'", show(v)))
		}
		for _, m := range s {
			if err := unmarshal(text, m.value); err != nil {
				return err
			}
		}
	}
	if !ok {
		return ocamlFailure(fmt.Sprintf("Expected %s, got '%s'", k, show(v)))
	}
	return nil
}

// method is one API call.
type method struct {
	name     string
	session  bool                                // whether the first parameter is a session
	params   []kind                              // without the session
	optional []kind                              // calls that have some ignore excess parameters
	check    func(c *call) error                 // unmarshalling beyond params
	role     Role                                // the lowest that may call it
	mutates  bool                                // a Restart does not end it
	run      func(h *Host, c *call) (any, error) // with h.mu held; may unlock it while waiting
}

// call is one call in progress.
type call struct {
	method  *method
	args    []any          // without the session
	session *sessionObject // nil for login
	wire    vbdFields      // of VBD.create
}

func (c *call) text(i int) string { return c.args[i].(string) }

// methods is the table of all calls.
var methods map[string]*method

func init() { // not an initialiser: permissions, which handlers reach, reads the table
	methods = map[string]*method{}
	for _, table := range [][]*method{sessionMethods(), vmMethods(), guestMethods(), vdiMethods(), vbdMethods(), networkMethods(), srMethods()} {
		for _, m := range table {
			methods[m.name] = m
		}
	}
}

func lookUp(name string) *method {
	if m, ok := methods[name]; ok {
		return m
	}
	// VBD_plug is an old spelling of VBD.plug.
	if class, rest, ok := strings.Cut(name, "_"); ok && !strings.Contains(class, ".") {
		return methods[class+"."+rest]
	}
	return nil
}

// dispatch runs one call. Its checks are made in xapi's order: text, method
// name, number of parameters, their types, session, role, and only then the
// objects. dispatched is false for errors that xapi raises before all this.
func (h *Host) dispatch(name string, params []any) (value any, dispatched bool, err error) {
	h.mu.Lock()
	h.record(name, params)
	restarts := h.restarts
	point := h.callPoint(name)
	if point != nil {
		h.mu.Unlock()
		if point(false) == Drop {
			return nil, false, errDropped
		}
		h.mu.Lock()
	}
	drop := takeOne(h.faults.drop, name)
	lose := !drop && takeOne(h.faults.lose, name)
	crash := !drop && takeOne(h.faults.crash, name)
	booting := h.faults.booting
	h.mu.Unlock()

	switch {
	case drop:
		return nil, false, errDropped
	case crash:
		return nil, false, internalError("Not_found")
	case booting:
		err = fail("HOST_STILL_BOOTING")
	default:
		if err = checkText(params); err == nil {
			dispatched = true
			value, err = h.execute(name, params, restarts)
		}
	}
	executed := !errors.Is(err, errDropped)
	if executed && point != nil && point(true) == Drop || lose {
		return nil, dispatched, errDropped
	}
	return value, dispatched, err
}

// record records an arrived call; h.mu is held.
func (h *Host) record(name string, params []any) {
	c := Call{Method: name, Local: name == loginMethod}
	if len(params) > 0 && !c.Local {
		ref, _ := params[0].(string)
		s := h.sessions[ref]
		c.Local = s != nil && s.local
	}
	h.calls = append(h.calls, c)
	h.log.Debug("xapi call", "method", name, "local", c.Local)
	h.notify()
}

// checkText refuses text that xapi refuses after the XML parser.
func checkText(params []any) error {
	for _, p := range params {
		if s := show(p); !utf8.ValidString(s) {
			return fail("INVALID_VALUE", "Invalid UTF-8 string in parameter", s)
		}
	}
	return nil
}

func (h *Host) execute(name string, params []any, restarts int) (any, error) {
	m := lookUp(name)
	if m == nil {
		return nil, h.unknown(name, params)
	}
	c, err := bind(m, name, params)
	if err != nil {
		return nil, err
	}
	if m.session {
		ref, _ := params[0].(string)
		if c.session, err = h.checkSession(ref); err != nil {
			return nil, err
		}
		if err := checkRole(c.session, m); err != nil {
			return nil, err
		}
	}
	if err := h.hold(m.name); err != nil {
		return nil, err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.restarts != restarts && !m.mutates {
		return nil, errDropped
	}
	return m.run(h, c)
}

// unknown returns the error for a method that does not exist. xapi first checks the session
// in the first parameter, because the method could belong to an extension.
func (h *Host) unknown(name string, params []any) error {
	if len(params) > 0 {
		if err := unmarshal(text, params[0]); err != nil {
			return err
		}
		if _, err := h.checkSession(params[0].(string)); err != nil {
			return err
		}
	}
	return fail("MESSAGE_METHOD_UNKNOWN", name)
}

func (h *Host) checkSession(ref string) (*sessionObject, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	s := h.sessions[ref]
	if s == nil {
		return nil, fail("SESSION_INVALID", ref)
	}
	return s, nil
}

// bind checks the number and the types of the parameters.
func bind(m *method, name string, params []any) (*call, error) {
	kinds, received := m.params, len(params)
	if m.session {
		kinds, received = append([]kind{text}, kinds...), received-1
	}
	if len(params) < len(kinds) || len(params) > len(kinds) && m.optional == nil {
		return nil, fail("MESSAGE_PARAMETER_COUNT_MISMATCH", name, strconv.Itoa(len(m.params)), strconv.Itoa(received))
	}
	kinds = append(kinds[:len(kinds):len(kinds)], m.optional...)
	for i, p := range params {
		if i == len(kinds) {
			break
		}
		if err := unmarshal(kinds[i], p); err != nil {
			return nil, err
		}
	}
	c := &call{method: m, args: params}
	if m.session {
		c.args = params[1:]
	}
	if m.check != nil {
		if err := m.check(c); err != nil {
			return nil, err
		}
	}
	return c, nil
}

func stringMapOf(v any) map[string]string {
	m := map[string]string{}
	for _, e := range v.(structure) {
		m[e.name], _ = e.value.(string)
	}
	return m
}

func mapValue(m map[string]string) structure {
	s := structure{}
	for _, k := range slices.Sorted(maps.Keys(m)) {
		s = append(s, member{k, m[k]})
	}
	return s
}
