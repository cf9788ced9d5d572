"""`ctr run -t`: a terminal that behaves like one."""

from harness import Case

# Two terminals follow one another, the container's and ctr's own, and with every runtime each of them puts a carriage
# return before the end of a line.
END = r"\r+\n"


class TerminalTest(Case):
    def test_all_streams_are_the_terminal(self):
        terminal = self.terminal_container("sh", "-c", "test -t 0 && test -t 1 && test -t 2 && tty")
        terminal.expect("/dev/(pts/0|console)")
        self.assertEqual(terminal.wait(), 0)

    def test_size_follows_the_window(self):
        terminal = self.terminal_container(
            "sh", "-c", "trap 'stty size' WINCH; echo ready; while :; do sleep 0.2; done", rows=33, columns=111)
        terminal.expect("ready")
        terminal.resize(40, 120)
        terminal.expect("40 120")
        terminal.resize(50, 70)
        terminal.expect("50 70")

    def test_initial_size_arrives(self):
        # It is set after the start, by an event: asking until it is there is what programs do, too.
        terminal = self.terminal_container(
            "sh", "-c", "until [ \"$(stty size)\" = '33 111' ]; do sleep 0.2; done; echo it fits", rows=33, columns=111)
        terminal.expect("it fits")
        self.assertEqual(terminal.wait(), 0)

    def test_typed_lines_are_echoed_and_run(self):
        terminal = self.terminal_container("sh")
        terminal.expect("# ")
        terminal.type("echo $((6 * 7))\n")
        terminal.expect(rf"echo \$\(\(6 \* 7\)\){END}42{END}")
        terminal.expect("# ")
        terminal.type("exit 3\n")
        self.assertEqual(terminal.wait(), 3)

    def test_control_c_interrupts(self):
        terminal = self.terminal_container("sh", "-c", "trap 'echo caught; exit 7' INT; echo ready; while :; do sleep 1; done")
        terminal.expect("ready")
        terminal.type("\x03")
        terminal.expect("caught")
        self.assertEqual(terminal.wait(), 7)

    def test_control_d_ends_input(self):
        # What is typed before is echoed by ctr's own terminal, which it has not made raw yet.
        terminal = self.terminal_container("sh", "-c", "echo ready; cat; echo over; exit 5")
        terminal.expect(f"ready{END}")
        terminal.type("line\n")
        terminal.expect(f"line{END}line{END}")
        terminal.type("\x04")
        terminal.expect("over")
        self.assertEqual(terminal.wait(), 5)

    def test_exec_on_a_terminal(self):
        task = self.start()
        terminal = self.terminal("task", "exec", "-t", "--exec-id", "shell", task.name, "sh", rows=20, columns=90)
        terminal.expect("# ")
        terminal.type("until [ \"$(stty size)\" = '20 90' ]; do sleep 0.2; done; tty; exit 9\n")
        terminal.expect("/dev/pts/")
        self.assertEqual(terminal.wait(), 9)
