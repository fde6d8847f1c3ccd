// SPDX-License-Identifier: GPL-2.0

// check.go FILE [CONSTS] checks the format of a description, and with its constants whether
// it compiles together with syzkaller's own. Without them it prints what is constant: in
// each line a name, or a name and its definition. Runs in a checkout of syzkaller.
package main

import (
	"bytes"
	"fmt"
	"os"

	"github.com/google/syzkaller/pkg/ast"
	"github.com/google/syzkaller/pkg/compiler"
	"github.com/google/syzkaller/sys/targets"
)

func main() {
	failed := false
	file := os.Args[1]
	// What else the compiler says is about system calls of other architectures.
	fail := func(pos ast.Pos, message string) {
		if pos.File == file {
			failed = true
			fmt.Fprintf(os.Stderr, "%v: %v\n", pos, message)
		}
	}
	text, err := os.ReadFile(file)
	if err != nil {
		panic(err)
	}
	target := targets.Get(targets.Linux, targets.AMD64)
	ours := ast.Parse(text, file, fail)
	all := ast.ParseGlob("sys/linux/*.txt", fail)
	if ours == nil || all == nil {
		os.Exit(1)
	}
	if !bytes.Equal(ast.Format(ours), text) {
		fail(ast.Pos{File: file}, "not as syz-fmt writes it")
	}
	all.Nodes = append(all.Nodes, ours.Nodes...)
	if len(os.Args) > 2 {
		consts := compiler.DeserializeConstFile("sys/linux/*.const", fail).Arch(target.Arch)
		for name, value := range compiler.DeserializeConstFile(os.Args[2], fail).Arch(target.Arch) {
			consts[name] = value
		}
		failed = compiler.Compile(all, consts, target, fail) == nil || failed
	} else if info := compiler.ExtractConsts(all, target, fail)[file]; info != nil {
		for _, used := range info.Consts {
			fmt.Println(used.Name, info.Defines[used.Name])
		}
	}
	if failed {
		os.Exit(1)
	}
}
