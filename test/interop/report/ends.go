package main

import (
	"fmt"
	"slices"
	"strings"
)

// ends are the lines "end: client/mode/kind of end: behaviour" of a test. The behaviour may be
// followed by ": " and a message.
type ends struct {
	kinds   []string
	clients []string
	modes   []string
	cells   map[endCell]string // behaviours
	notes   []string           // messages
}

// endCell is a place in the table.
type endCell struct{ client, mode, kind string }

// line takes a line of a log, and reports whether it is one of ends.
func (e *ends) line(text string) bool {
	text, ok := strings.CutPrefix(text, "end: ")
	if !ok {
		return false
	}
	place, behaviour, _ := strings.Cut(text, ": ")
	parts := strings.SplitN(place, "/", 3)
	if len(parts) != 3 {
		return false
	}
	c := endCell{parts[0], parts[1], parts[2]}
	if e.cells == nil {
		e.cells = map[endCell]string{}
	}
	addNew(&e.clients, c.client)
	addNew(&e.modes, c.mode)
	addNew(&e.kinds, c.kind)
	if behaviour, message, ok := strings.Cut(behaviour, ": "); ok {
		note := addNew(&e.notes, message)
		e.cells[c] = fmt.Sprintf("%s [%d]", behaviour, note+1)
	} else {
		e.cells[c] = behaviour
	}
	return true
}

// addNew adds an element unless there is an equal one, and returns its index.
func addNew(list *[]string, element string) int {
	if i := slices.Index(*list, element); i >= 0 {
		return i
	}
	*list = append(*list, element)
	return len(*list) - 1
}

// markdown returns a table, and the messages that its numbers stand for; nothing if there are
// no ends.
func (e *ends) markdown() string {
	if len(e.kinds) == 0 {
		return ""
	}
	var b strings.Builder
	fmt.Fprintf(&b, "\n| client | %s |\n|---|%s\n", strings.Join(e.kinds, " | "), strings.Repeat("---|", len(e.kinds)))
	for _, client := range e.clients {
		fmt.Fprintf(&b, "| %s |", cell(client))
		for _, kind := range e.kinds {
			fmt.Fprintf(&b, " %s |", cell(e.behaviour(client, kind)))
		}
		b.WriteString("\n")
	}
	b.WriteString("\n")
	for i, message := range e.notes {
		fmt.Fprintf(&b, "%d. \"%s\"\n", i+1, strings.ReplaceAll(message, "`", "'"))
	}
	return b.String()
}

// behaviour returns the behaviour in all modes, once if it is the same in all of them.
func (e *ends) behaviour(client, kind string) string {
	var different, each []string
	for _, mode := range e.modes {
		if behaviour, ok := e.cells[endCell{client, mode, kind}]; ok {
			addNew(&different, behaviour)
			each = append(each, mode+": "+behaviour)
		}
	}
	if len(different) <= 1 {
		return strings.Join(different, "")
	}
	return strings.Join(each, "; ")
}
