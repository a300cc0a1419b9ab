// Package text lays out text for terminals: lines of limited width, without control
// characters.
package text
