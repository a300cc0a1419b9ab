package xapitest

import "strings"

// expression is a compiled filter of get_all_records_where. row returns the database text of
// a field, and whether the field exists.
type expression func(row func(field string) (string, bool)) (bool, error)

// operand is a literal or a field.
type operand struct {
	field bool
	text  string
}

// parseFilter compiles a filter. As in xapi's grammar, "and" and "or" bind
// equally and to the left, and "not" applies to all that follows it. Literals
// have no escapes.
func parseFilter(source string) (expression, error) {
	tokens, ok := lexFilter(source)
	if ok {
		p := &filterParser{tokens: tokens}
		if e := p.expr(); !p.failed && len(p.tokens) == 0 {
			return e, nil
		}
		return nil, fail("INVALID_VALUE", source, "Stdlib.Parsing.Parse_error")
	}
	return nil, fail("INVALID_VALUE", source, `Failure("lexing: empty token")`)
}

func lexFilter(s string) (tokens []string, ok bool) {
scan:
	for s != "" {
		if strings.ContainsRune(" \t\n", rune(s[0])) {
			s = s[1:]
			continue
		}
		if s[0] == '"' {
			end := strings.IndexByte(s[1:], '"')
			if end < 0 {
				return nil, false
			}
			tokens = append(tokens, s[:end+1]) // with the opening quote, which marks a literal
			s = s[end+2:]
			continue
		}
		for _, word := range []string{"=", "true", "false", "(", ")", "field", "and", "or", "not"} {
			if rest, found := strings.CutPrefix(s, word); found {
				tokens = append(tokens, word)
				s = rest
				continue scan
			}
		}
		return nil, false
	}
	return tokens, true
}

type filterParser struct {
	tokens []string
	failed bool
}

func (p *filterParser) take() string {
	if len(p.tokens) == 0 {
		p.failed = true
		return ""
	}
	t := p.tokens[0]
	p.tokens = p.tokens[1:]
	return t
}

func (p *filterParser) expr() expression {
	left := p.term()
	for !p.failed && len(p.tokens) > 0 {
		op := p.tokens[0]
		if op != "and" && op != "or" {
			break
		}
		p.take()
		left = combine(op, left, p.term())
	}
	return left
}

func combine(op string, left, right expression) expression {
	return func(row func(string) (string, bool)) (bool, error) {
		l, err := left(row)
		if err != nil || l == (op == "or") {
			return l, err
		}
		return right(row)
	}
}

func (p *filterParser) term() expression {
	switch t := p.take(); t {
	case "true", "false":
		return func(func(string) (string, bool)) (bool, error) { return t == "true", nil }
	case "not":
		inner := p.expr()
		return func(row func(string) (string, bool)) (bool, error) {
			v, err := inner(row)
			return !v, err
		}
	case "(":
		inner := p.expr()
		if p.take() != ")" {
			p.failed = true
		}
		return inner
	default:
		left := p.operand(t)
		if p.take() != "=" {
			p.failed = true
		}
		right := p.operand(p.take())
		return func(row func(string) (string, bool)) (bool, error) {
			l, err := left.value(row)
			if err != nil {
				return false, err
			}
			r, err := right.value(row)
			return l == r, err
		}
	}
}

func (p *filterParser) operand(t string) operand {
	o := operand{field: t == "field"}
	if o.field {
		t = p.take()
	}
	literal, ok := strings.CutPrefix(t, `"`)
	if !ok {
		p.failed = true
	}
	o.text = literal
	return o
}

func (o operand) value(row func(string) (string, bool)) (string, error) {
	if !o.field {
		return o.text, nil
	}
	v, ok := row(o.text)
	if !ok {
		return "", fail("INTERNAL_ERROR", "missing column", o.text, "")
	}
	return v, nil
}
